"""From a configuration to the objects of the road: codec, process, mask, backbone, objective."""

from dataclasses import dataclass
from typing import Any

import torch

from msmdiff.core import backbones
from msmdiff.core.config import Config, ModelConfig
from msmdiff.core.diffusion import codecs, masking, objectives, process
from msmdiff.core.errors import UsageError


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


def resolve(config: Config, data_classes: int | None = None) -> Config:
    """Complete a configuration (named sizes, automatic values) and check that its parts fit each
    other.

    `data_classes` is how many classes the data has (None: the data is not at hand). Raises
    UsageError with every problem found, not only the first.
    """
    config = config.model_copy(deep=True)
    problems: list[str] = []

    def attempt(function, *args):  # collect what each part has to complain of
        try:
            return function(*args)
        except UsageError as error:
            problems.append(str(error))
            return None

    model = attempt(backbones.resolve, config.model)
    if model is not None:
        config.model = model
        problems += _check_classes(config, data_classes)
        problems += _choose_objective(config)
        if config.optim.lr is None:
            config.optim.lr = derived_rate(config.model)
    if config.optim.betas is None:
        config.optim.betas = [0.99, 0.99] if config.optim.name == "adamw" else [0.98, 0.92, 0.99]
    if config.optim.schedule != "constant" and config.optim.decay_steps is None:
        config.optim.decay_steps = config.train.steps
    if (config.codec.mean is None) != (config.codec.std is None):
        problems.append(
            "codec.mean and codec.std belong together: give both, or neither to measure them"
        )
    steps, sampler = config.sample.steps, config.sample.sampler
    if sampler in ("ddim", "ddpm") and isinstance(steps, int) and steps > config.process.timesteps:
        problems.append(
            f"sample.steps {steps} exceeds process.timesteps {config.process.timesteps}"
        )
    attempt(process.build, config.process)
    wanted = 2 if config.optim.name == "adamw" else 3
    if len(config.optim.betas) != wanted or not all(0 <= b < 1 for b in config.optim.betas):
        problems.append(
            f"optim.betas {config.optim.betas}: {config.optim.name} takes {wanted} "
            "numbers in [0, 1)"
        )
    if any(not 0 < d < 1 for d in config.ema.decays):
        problems.append(
            f"ema.decays {config.ema.decays}: every decay must lie between 0 and 1 (no average: [])"
        )
    micro = config.train.micro_batch_size
    if micro and config.train.batch_size % micro:
        near = _nearest_multiples(config.train.batch_size, micro)
        problems.append(
            f"train.batch_size {config.train.batch_size} does not divide by "
            f"train.micro_batch_size {micro}{near}"
        )
    problems += _check_sizes(config) if model is not None else []
    codec = attempt(codecs.build, config.codec, config.data.image_size) if not problems else None
    if codec is not None and model is not None:
        network = attempt(_on_meta, config, codec.shape)
        if network is not None:
            attempt(masking.build, config.mask, network.grid)
            groups = config.objective.channel_groups
            if groups and sum(groups) != codec.shape[0]:
                problems.append(
                    f"objective.channel_groups {groups} must add up to the {codec.shape[0]} "
                    "channels, such as "
                    f"[3, {codec.shape[0] - 3}], or be null"
                )
    if problems:
        raise UsageError("; ".join(problems))
    return config


def context_shape(config: Config) -> tuple[int, int] | None:
    """(tokens, width) of the text features that a resolved configuration's network draws from, or
    None.
    """
    fields = config.model.model_dump()
    return (
        (fields["context_tokens"], fields["context_width"])
        if fields.get("context_tokens")
        else None
    )


def derived_rate(model: ModelConfig) -> float:
    """The learning rate where none is given: MaskDM's 2e-4 at width 512, inversely with the width,
    at most 1e-3.
    """
    return min(1e-3, 2e-4 * 512 / model.model_dump()["hidden_size"])


def build(config: Config) -> Parts:
    """The parts a resolved configuration describes."""
    codec = codecs.build(config.codec, config.data.image_size)
    network = backbones.build(config.model, codec.shape)
    noise = process.build(config.process)
    mask = masking.build(config.mask, network.grid)
    return Parts(
        codec=codec,
        process=noise,
        mask=mask,
        backbone=network,
        objective=objectives.build(config.objective, config.mask, noise, mask, network),
    )


def _on_meta(config: Config, shape: tuple[int, int, int]) -> Any:
    with torch.device("meta"):
        return backbones.build(config.model, shape)


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


TWO_PASSES = {"mdt": "mdt", "mdtv2": "mdt", "edt": "edt"}
"""Families with an objective of their own, which drop no tokens otherwise."""


def _choose_objective(config: Config) -> list[str]:
    """Settle `auto` and MDT's mask as published, and say what does not go together."""
    objective, mask, family = config.objective, config.mask, str(config.model.family)
    masked = bool(mask.ratio or (mask.kind == "crop" and mask.crop))
    if objective.name == "auto":
        objective.name = TWO_PASSES.get(family, "msm" if masked else "dsm")  # type: ignore[assignment]
    if objective.name == "mdt":
        mask.ratio = mask.ratio or 0.3
        mask.spread = (0.2 if family == "mdtv2" else 0.0) if mask.spread is None else mask.spread
    problems = []
    if objective.name == "dsm" and masked:
        problems.append(
            f"objective.name 'dsm' sees every token, but mask.ratio is {mask.ratio}: use 'msm', "
            "or a ratio of 0"
        )
    own = TWO_PASSES.get(family)
    if objective.name in ("msm", "mdt", "edt") and objective.name != (own or "msm"):
        fits = f"'{own}' or 'dsm'" if own else "'msm' or 'dsm'"
        problems.append(
            f"objective.name '{objective.name}' does not suit model.family {family}: use {fits}"
        )
    if objective.name == "mdt" and (mask.kind != "patch" or mask.ratio + (mask.spread or 0.0) >= 1):
        problems.append(
            f"objective.name 'mdt' hides single tokens: mask.kind must be patch, not {mask.kind}, "
            "and mask.ratio "
            f"{mask.ratio} plus mask.spread {mask.spread} below 1"
        )
    if objective.name == "edt" and masked:
        problems.append(
            f"objective.name 'edt' draws masks of its own: mask.ratio must be 0, not {mask.ratio}"
        )
    labelled = config.model.num_classes and config.model.model_dump().get("null_class") is False
    if labelled and objective.label_dropout:
        problems.append(
            f"objective.label_dropout {objective.label_dropout} needs a null class: set "
            "model.null_class=true, or 0"
        )
    if config.process.schedule in ("vp_sde", "vp_cosine"):
        wrong = (
            "process.time_sampling 'loss_second_moment'"
            if config.process.time_sampling.startswith("loss")
            else ""
        )
        wrong = "model.learn_sigma" if config.model.model_dump().get("learn_sigma") else wrong
        if wrong:
            problems.append(
                f"{wrong} needs a schedule of discrete steps, not {config.process.schedule}"
            )
    return problems


def _check_sizes(config: Config) -> list[str]:
    """The side of an image must divide by the codec's factor times the patch."""
    factor = {"pixel": 1, "dwt": 2**config.codec.level, "vae": config.codec.factor}[
        config.codec.name
    ]
    patch = config.model.model_dump()["patch_size"]
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
