"""What a training settles before its first step: automatic values, what is measured of the data,
what the condition is told of them, and the weights that it starts from.
"""

from collections.abc import Callable
from typing import Any

import torch

from msmdiff.core import build as road
from msmdiff.core import weights
from msmdiff.core.condition import Condition, Text, describe
from msmdiff.core.config import Config
from msmdiff.core.data.latents import Latents
from msmdiff.core.data.loader import TrainingImages
from msmdiff.core.data.source import Source
from msmdiff.core.diffusion import codecs
from msmdiff.core.training import launch, warmstart

Note = Callable[[str], None]


def resolved(config: Config, begun: Config | None, num_classes: int | None) -> Config:
    """A configuration with its automatic values, as a training of it computes.

    Args:
        begun: the configuration of the run that it may continue: the first length of its decay
            and what it measured of the data stay.
        num_classes: of the data.

    Raises UsageError for a configuration that cannot work.
    """
    config = config.model_copy(deep=True)
    if begun and config.optim.decay_steps is None:  # more steps later do not change the past
        config.optim.decay_steps = begun.optim.decay_steps
    config = road.resolve(config, num_classes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config.train.precision = launch.choose_precision(config, device)
    missing = codecs.open_measures(config.codec, codecs.build(config.codec, config.data.image_size))
    if begun and begun.codec.model_copy(update=dict.fromkeys(missing)) == config.codec:
        config.codec = begun.codec
    return config


def measured(config: Config, dataset: TrainingImages, note: Note) -> Config:
    """Measure what the codec needs to know of the data and has not been told."""
    codec = codecs.build(config.codec, config.data.image_size)
    if not codecs.open_measures(config.codec, codec):
        return config
    for name, values in codec.measure(dataset.sample(2048)).items():
        setattr(config.codec, name, values)
        shown = ", ".join(f"{value:.3g}" for value in values)
        note(f"measured codec.{name} of the data: {shown}")
    return config


def tell_condition(condition: Condition, source: Source, device: torch.device) -> None:
    """Classes get their names; a network that draws from text learns what the empty one is."""
    describe(condition, source.class_names, source.class_counts)
    if isinstance(condition, Text) and isinstance(source, Latents):
        empty = source.null_context if source.captioned else None
        condition.null = None if empty is None else empty.to(device)


def start_from_weights(
    config: Config, backbone: Any, source: Source, allow_partial: bool, note: Note
) -> None:
    """Load what fits of `train.init_from`, and say what did. Raises UsageError where too little
    does, unless that is allowed.
    """
    path = weights.locate(str(config.train.init_from))
    stored = weights.read(path, hints=warmstart.told_by(config))
    report = warmstart.start_from(backbone, stored, allow_partial, source.class_names)
    for line in report.lines():
        note(line)
