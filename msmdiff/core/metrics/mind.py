"""MIND: how far two sets of features are apart along random directions; 5,000 images rank models as
50,000 do for a Fréchet distance (torch-fidelity).
"""

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.scores import Metric, Score, score
from msmdiff.core.metrics.statistics import Statistics
from msmdiff.core.registry import Options, register
from msmdiff.core.seeding import numpy_stream

AT_ONCE = 64
"""Directions that are sorted together."""


class MindOptions(Options):
    mind_directions: int = Field(
        1000, ge=1, le=100_000, description="The number of random unit directions."
    )


@register("metric", "mind", MindOptions)
class Mind(Metric):
    """Sliced squared Wasserstein distance of the features, times 3 d."""

    rows_of = "ab"

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        if a.rows is None or b.rows is None:
            return []
        value = mind(a.rows, b.rows, self.options["mind_directions"], features.device)
        return [score("mind", "MIND", value, sets=(a, b), features=features)]


def mind(a: Tensor, b: Tensor, directions: int = 1000, device: torch.device | str = "cpu") -> float:
    """3 d times the mean, over random unit directions of a fixed seed, of the mean squared
    difference of the sorted projections of a [N, d] and b [M, d].

    Of sets of different sizes, both are read at the quantiles (i + 1/2) / min(N, M), linearly
    between their values.
    """
    width, count = a.shape[1], min(len(a), len(b))
    drawn = torch.from_numpy(numpy_stream(0, "mind").standard_normal((directions, width)))
    units = (drawn / drawn.norm(dim=1, keepdim=True)).to(device)
    a, b = a.double().to(device), b.double().to(device)
    total = 0.0
    for part in units.split(AT_ONCE):
        x, y = (_sorted_at(rows @ part.T, count) for rows in (a, b))  # [count, directions]
        total += float((x - y).square().mean(dim=0).sum())
    return 3 * width * total / directions


def _sorted_at(projected: Tensor, count: int) -> Tensor:
    """Columns [N, k] in order, at `count` even quantiles: [count, k]."""
    ordered = projected.sort(dim=0).values
    if len(ordered) == count:
        return ordered
    steps = torch.arange(count, dtype=torch.float64, device=ordered.device) + 0.5
    place = (steps / count * len(ordered) - 0.5).clamp(0, len(ordered) - 1)
    low = place.floor().long()
    share = (place - low)[:, None]
    return ordered[low] * (1 - share) + ordered[(low + 1).clamp(max=len(ordered) - 1)] * share
