"""From a configuration to the objects of the road: codec, process, mask, backbone, objective."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from msmdiff.core import backbones, registry
from msmdiff.core.config import Config
from msmdiff.core.diffusion import alignment, codecs, masking, objectives, process, time_sampling
from msmdiff.core.errors import UsageError
from msmdiff.core.samplers import times
from msmdiff.core.sections import ModelConfig

T = TypeVar("T")


@dataclass
class Parts:
    """What a configuration describes, except the trained numbers. The backbone is freshly
    initialised.
    """

    codec: codecs.Codec
    process: process.Process
    mask: masking.Mask
    backbone: Any
    objective: objectives.Objective

    def alignment(self, config: Config) -> alignment.Alignment | None:
        """The alignment that a training with these parts asks for, freshly initialised.

        Raises UsageError for blocks that the network has not.
        """
        around = alignment.Surroundings(self.backbone, self.process, self.codec)
        return alignment.build(config.objective, around)


def resolve(config: Config, data_classes: int | None = None) -> Config:
    """Complete a configuration (named sizes, automatic values) and check that its parts fit each
    other.

    `data_classes` is how many classes the data has (None: the data is not at hand). Raises
    UsageError with every problem found, not only the first.
    """
    config = config.model_copy(deep=True)
    problems: list[str] = []

    def attempt(function: Callable[..., T], *arguments: Any) -> T | None:
        """Collect what each part has to complain of."""
        try:
            return function(*arguments)
        except UsageError as error:
            problems.append(str(error))
            return None

    model = attempt(backbones.resolve, config.model)
    if model is not None:
        config.model = model
        problems += _check_classes(config, data_classes)
        problems += _check_objective(config)
        if config.optim.lr is None:
            config.optim.lr = derived_rate(config.model)
    if config.optim.schedule != "constant" and config.optim.decay_steps is None:
        config.optim.decay_steps = config.train.steps
    problems += _check_numbers(config)
    noise = attempt(process.build, config.process)
    if noise is not None:
        attempt(time_sampling.build, config.process, noise.schedule)
        if config.model.model_dump().get("learn_sigma"):
            attempt(noise.table, "model.learn_sigma")
        attempt(times.visited, noise.schedule, config.sample)
    problems += _check_sizes(config) if model is not None else []
    if not problems:
        codec = attempt(codecs.build, config.codec, config.data.image_size)
        network = attempt(_on_meta, config, codec.shape) if codec is not None else None
        if codec is not None:
            problems += _check_threshold(config, codec)
        if codec is not None and network is not None:
            problems += _check_groups(config, codec.shape[0])
            attempt(_check_passes, config, network, codec)
    if problems:
        raise UsageError("; ".join(problems))
    return config


def derived_rate(model: ModelConfig) -> float:
    """The learning rate where none is given: MaskDM's 2e-4 at width 512, inversely with the width,
    at most 1e-3. 2e-4 of a network that names no width.
    """
    return min(1e-3, 2e-4 * 512 / (model.model_dump().get("hidden_size") or 512))


def build(config: Config, device: torch.device | None = None) -> Parts:
    """The parts a resolved configuration describes.

    The network is made on `device`, where its first weights are drawn too: the 700 million of an XL
    network take half a minute of one core, and no time of a GPU. The numbers are each device's own.
    """
    codec = codecs.build(config.codec, config.data.image_size)
    with device or nullcontext():
        network = backbones.build(config.model, codec.shape)
    noise = process.build(config.process)
    mask = masking.build(config.mask, network.grid)
    objective = objectives.build(config, noise, mask, network)
    return Parts(codec=codec, process=noise, mask=mask, backbone=network, objective=objective)


def notes(config: Config) -> list[str]:
    """What a resolved configuration says to no effect, or against its own interest; for people."""
    network = _on_meta(config, codecs.build(config.codec, config.data.image_size).shape)
    return [*objectives.idle(config, network), *process.unsuited(config.process)]


def _on_meta(config: Config, shape: tuple[int, int, int]) -> Any:
    with torch.device("meta"):
        return backbones.build(config.model, shape)


def _check_passes(config: Config, network: Any, codec: codecs.Codec) -> None:
    """Raises UsageError where a mask, a route or an alignment does not suit the network."""
    noise = process.build(config.process)
    mask = masking.build(config.mask, network.grid)
    with torch.device("meta"):
        objective = objectives.build(config, noise, mask, network)
        made = Parts(codec, noise, mask, network, objective).alignment(config)
    if made is None:
        return
    name, chosen = config.objective.name, config.objective.alignment
    if len(objective.passes) > 1 or type(objective).seen is not objectives.Objective.seen:
        raise UsageError(
            f"objective.alignment {chosen} goes beside the one pass of objective.name dsm, msm or "
            f"maskdit, not beside {name}"
        )
    if made.averaged and not config.ema.decays:
        raise UsageError(
            f"objective.alignment {chosen} learns from a moving average: give ema.decays one"
        )


def _check_classes(config: Config, data_classes: int | None) -> list[str]:
    wanted = config.model.num_classes
    if isinstance(wanted, int) and wanted < 0:
        return [f"model.num_classes {wanted} must be 0 (unconditional), a positive number, or auto"]
    if wanted and data_classes is not None and data_classes < 2 and wanted != data_classes:
        found = "no labels" if not data_classes else "one class only"
        return [
            f"model.num_classes is {wanted}, but {config.data.source} has {found}: put images "
            "into one sub-folder per "
            "class, name them ClassID_anything.jpg, or train --unconditional"
        ]
    if wanted == "auto" and data_classes is None:
        return ["model.num_classes is auto, which needs the data at hand: give a number"]
    if wanted == "auto" and data_classes is not None:
        config.model.num_classes = wanted = data_classes
    if isinstance(wanted, int) and wanted and data_classes is not None and data_classes > wanted:
        return [
            f"{config.data.source} has {data_classes} classes, more than model.num_classes {wanted}"
        ]
    return []


def _check_objective(config: Config) -> list[str]:
    """Settle what is automatic, and say what does not go together."""
    problems = objectives.settle(config, backbones.network_class(config.model))
    model = config.model.model_dump()
    unlabelled = model["num_classes"] and model.get("null_class") is False
    if unlabelled and config.objective.label_dropout:
        problems.append(
            f"objective.label_dropout {config.objective.label_dropout} needs a null class: "
            "set model.null_class=true, or 0"
        )
    return problems


def _check_numbers(config: Config) -> list[str]:
    """What numbers ask of each other, across sections."""
    problems = []
    codec: Any = config.codec.model_dump()
    if (codec.get("mean") is None) != (codec.get("std") is None):
        problems.append(
            "codec.mean and codec.std belong together: give both, or neither to measure them"
        )
    if any(not 0 < decay < 1 for decay in config.ema.decays):
        problems.append(
            f"ema.decays {config.ema.decays}: every decay must lie between 0 and 1 (no average: [])"
        )
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    if micro and batch % micro:
        near = _nearest_multiples(batch, micro)
        problems.append(
            f"train.batch_size {batch} does not divide by train.micro_batch_size {micro}{near}"
        )
    return problems


def _check_threshold(config: Config, codec: codecs.Codec) -> list[str]:
    """Dynamic thresholding scales x0 to -1..1, which would shrink what has no such bound."""
    if config.sample.threshold is None or codec.bounded:
        return []
    return [
        f"sample.threshold {config.sample.threshold:g} is for pixels, whose bound is 1; codec "
        f"{config.codec.name} has none: leave it out"
    ]


def _check_groups(config: Config, channels: int) -> list[str]:
    groups = config.objective.channel_groups
    if not groups or sum(groups) == channels:
        return []
    return [
        f"objective.channel_groups {groups} must add up to the {channels} channels, such as "
        f"[3, {channels - 3}], or be null"
    ]


def _check_sizes(config: Config) -> list[str]:
    """The side of an image must divide by the codec's factor times the patch. A network whose patch
    is no option says itself what fits.
    """
    entry = registry.find("codec", config.codec.name, "codec.name")
    factor = entry.make.factor_of(entry.takes(config.codec))
    patch = config.model.model_dump().get("patch_size") or 1
    if config.data.image_size % (factor * patch) == 0:
        return []
    parts = (
        f"{factor} (codec {config.codec.name}) x {patch} (model.patch_size)"
        if factor > 1
        else "model.patch_size"
    )
    near = _nearest_multiples(config.data.image_size, factor * patch)
    return [
        f"data.image_size {config.data.image_size} does not divide by {factor * patch} = "
        f"{parts}{near}"
    ]


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    choices = [str(v) for v in (below, below + divisor) if v > 0]
    return (
        f"; the nearest valid values are {' and '.join(choices)}"
        if len(choices) > 1
        else f"; use {choices[0]}"
    )
