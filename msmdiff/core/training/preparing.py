"""What a training settles before its first step: what is measured of the data, what the condition
is told of them, and the weights that it starts from.
"""

from collections.abc import Callable
from typing import Any

import torch

from msmdiff.core import weights
from msmdiff.core.condition import Condition, Text, describe
from msmdiff.core.config import Config
from msmdiff.core.data.latents import Latents
from msmdiff.core.data.loader import TrainingImages
from msmdiff.core.data.source import Source
from msmdiff.core.diffusion import codecs
from msmdiff.core.training import warmstart
from msmdiff.core.training.run import Run

Note = Callable[[str], None]


def measured(config: Config, run: Run, dataset: TrainingImages, note: Note) -> Config:
    """Measure what the codec needs to know of the data, once; a resumed run keeps what it
    measured.
    """
    codec = codecs.build(config.codec, config.data.image_size)
    missing = codecs.open_measures(config.codec, codec)
    if not missing:
        return config
    stored = run.begun()
    if stored and stored.codec.model_copy(update=dict.fromkeys(missing)) == config.codec:
        config.codec = stored.codec
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
