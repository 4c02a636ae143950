"""What a training says of itself in words: how it starts, and what its end leaves to be known."""

from typing import Any

import torch

from msmdiff.core import machine
from msmdiff.core.build import Parts
from msmdiff.core.config import Config
from msmdiff.core.data.inspection import transparent
from msmdiff.core.data.latents import Latents
from msmdiff.core.data.source import Source
from msmdiff.core.diffusion import masking
from msmdiff.core.sections import EmaConfig
from msmdiff.core.training import results
from msmdiff.core.training.cost import Cost
from msmdiff.core.training.ema import progress


def data_line(source: Source) -> str:
    """The data, how many images there are, and their classes."""
    text = f"{source.spec}, {len(source):,} images"
    names = list(source.class_names)
    if not names:
        return text if source.num_classes is None else f"{text}, no classes"
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"{text}, {len(names)} classes ({shown})"


def introduction(
    config: Config, parts: Parts, cost: Cost, source: Source, where: str, run: Any
) -> list[tuple[str, str]]:
    """What to know when a training begins: (what, text).

    Args:
        config: resolved.
        parts: built from it.
        cost: of an image.
        source: the training's images.
        where: devices and processes, for people.
        run: the run's directory.
    """
    train, model = config.train, config.model
    total = train.steps * train.batch_size
    goal = f"{train.steps:,} steps, {total:,} images to see"
    if train.max_seconds is not None:
        goal = f"{train.max_seconds:,.0f} seconds, or {total:,} images"
    if where.startswith("cpu"):
        where += f", CPU threads: {torch.get_num_threads()}, waiting {machine.waiting()}"
    size = f"{cost.parameters / 1e6:.2f} M parameters, images of {config.data.image_size} px"
    rows = [
        ("data", _data(config, source)),
        ("network", f"{model.name or model.family}, {size}"),
        ("training", f"{goal}, batch {train.batch_size}, {train.precision} on {where}"),
        *_rate(config),
        *_mask(config, parts, cost),
    ]
    meaning = (
        f"{results.meaning(config)}; it compares only with runs whose loss is the same error "
        "(the held-out loss compares in one space)"
    )
    return [*rows, ("loss", meaning), ("results", str(run))]


def _data(config: Config, source: Source) -> str:
    told = "which the network learns" if config.model.num_classes else "--conditional learns them"
    text = data_line(source)
    if len(source.class_names) > 1:
        text += f", {told}"
    if not isinstance(source, Latents) and transparent(source):
        text += f"; transparency is laid on {config.data.background}"
    return text


def _rate(config: Config) -> list[tuple[str, str]]:
    optim, steps = config.optim, config.train.steps
    if not optim.decay_steps or optim.schedule == "constant" or optim.decay_steps >= steps:
        return []
    text = (
        f"the rate reaches {optim.final_lr:g} at step {optim.decay_steps:,} and stays there until "
        f"step {steps:,}: optim.decay_steps keeps what it was begun with"
    )
    return [("rate", text)]


def _mask(config: Config, parts: Parts, cost: Cost) -> list[tuple[str, str]]:
    """What is hidden and what that saves, where something is."""
    told, mask = [], parts.mask
    if config.objective.name == "mdt":
        section: Any = config.mask
        low, spread = section.ratio, section.spread or 0.0
        upper = f" to {low + spread:.0%}" if spread else ""
        told.append(f"a second pass hides {low:.0%}{upper} of the tokens")
    elif config.mask.ratio or mask.kept < mask.tokens:
        share = cost.masked_flops / cost.forward_flops
        told.append(
            f"the network sees {mask.kept} of {mask.tokens} tokens "
            f"({mask.effective_ratio:.1%} hidden), {share:.1%} of the full pass: a step saves "
            f"{1 - share:.1%} of its FLOPs"
        )
    if later := parts.objective.stages[1:]:
        ratios = dict(masking.over_training(config.mask))
        shown = ", ".join(f"{ratios[stage.start]:.0%} from {stage.start:.0%}" for stage in later)
        told.append(f"over the training: {shown}")
    return [("mask", "; ".join(told))] if told else []


def lost_config(run: Any) -> str:
    """Of a run whose configuration has to come from elsewhere."""
    return (
        f"{run}/config.yaml is lost or empty: the configuration is taken from the newest checkpoint"
    )


def seconds_left(config: Config, line: dict[str, Any], waited: float) -> float:
    """At the pace of a line of the log, until all images are seen or `train.max_seconds` are over,
    of which `waited` are.
    """
    total = config.train.steps * config.train.batch_size
    left, limit = (total - line["images"]) / line["images_per_s"], config.train.max_seconds
    return max(0.0, left if limit is None else min(left, limit - waited))


def finished(run: Any, config: Config) -> str:
    """Of a run that is started again when there is nothing left to do."""
    steps = config.train.steps
    return (
        f"{run} is finished: it has taken all of its {steps:,} steps. To train it further, give "
        f"more, such as --steps {2 * steps}"
    )


def unmoved_average(ema: EmaConfig, steps: int) -> str:
    """What is sampled from may be nearly the network before training: then a sentence on it."""
    if not ema.decays:
        return ""
    copied, moved = progress(ema, ema.decays[0], steps)
    if moved >= 0.9 or copied >= 0.9 * steps:
        return ""
    first = f"those after step {copied:,}" if copied else "the first weights"
    remedy = "a lower ema.power" if ema.warmup == "power" else "ema.warmup=power"
    return (
        f"note: weights.safetensors is the average of decay {ema.decays[0]:g}, which has gone "
        f"{moved:.1%} of the way from {first} to the trained ones: train longer, or with a "
        f"lower ema.decays, a lower ema.update_every, or {remedy}"
    )
