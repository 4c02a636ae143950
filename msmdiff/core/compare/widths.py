"""How good averages of several widths are: the curve from which a width is chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msmdiff.core import weights as weights_files
from msmdiff.core.metrics import evaluate, features, inputs, scores
from msmdiff.core.training import posthoc

BATCH = 125
"""Images per network pass."""


@dataclass
class Judged:
    """An average that was measured.

    Attributes:
        width: its relative width.
        error: how far off its profile is, see `posthoc.Solution`.
        distance: of its samples to the reference.
    """

    width: float
    error: float
    distance: float


@dataclass
class Settings:
    """How averages are measured.

    Attributes:
        reference: images or statistics.
        n: samples of each, of the seeds from 0 on.
        features, weights: what images are compared by.
        layers: configuration over the stored one, such as {"sample": {"steps": 20}}.
        device: where.
    """

    reference: str
    n: int = 500
    features: str = "pixel"
    weights: Path | None = None
    layers: Sequence[dict[str, Any]] = ()
    device: torch.device | str = "cpu"


def curve(
    run: Path,
    widths: Sequence[float],
    how: Settings,
    images: int | None = None,
    tell: Callable[[Judged], None] = lambda judged: None,
) -> tuple[list[Judged], str]:
    """Measure averages of these widths, which `tell` is told of one by one; and what the distance
    is called.

    Raises UsageError and MsmdiffError for snapshots, images or features that cannot be had.
    """
    made = posthoc.combine(run, widths[0], images)  # before anything costly: whether there are any
    kind, file = features.named(how.features, how.weights)
    network = features.build(kind, file, how.device)
    model = weights_files.load(posthoc.snapshots(run)[-1].path, how.device, how.layers)
    opened = inputs.open_input(how.reference, crop=model.config.data.image_size)
    reference = opened.stored or evaluate.of_input(opened, network)
    found = []
    for width in widths:
        made = posthoc.combine(run, width, images)
        model.backbone.load_state_dict(made.tensors)
        batches = inputs.Drawn("samples", model, how.n).batches(range(how.n), BATCH)
        drawn = evaluate.of_images(batches, network)
        distance = scores.compare(drawn, reference, network).value
        found.append(Judged(width, made.error, distance))
        tell(found[-1])
    return found, network.title


def draw(judged: Sequence[Judged], title: str) -> Any:
    """The curve, a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axis = figure.subplots()
    ordered = sorted(judged, key=lambda each: each.width)
    axis.plot([each.width for each in ordered], [each.distance for each in ordered], "o-")
    axis.set(xlabel="relative width of the average", ylabel=title)
    axis.grid(alpha=0.3)
    return figure
