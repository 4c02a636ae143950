"""Metrics by name: from the statistics of two sets to scores.

A new one is one class here or in a plugin, registered with its options.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.errors import UsageError
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.frechet import Gaussian, frechet_distance
from msmdiff.core.metrics.prdc import prdc
from msmdiff.core.metrics.statistics import Statistics
from msmdiff.core.registry import Options, register
from msmdiff.core.seeding import numpy_stream


@dataclass
class Score:
    """A number, what it is called by scripts and by people, and over which images and features it
    was taken.

    `deviation` is over splits or subsets, `interval` the bootstrap's 95 %, where there are any.
    """

    name: str
    title: str
    value: float
    features: str
    count_a: int
    count_b: int
    deviation: float | None = None
    interval: tuple[float, float] | None = None


class Metric:
    """One metric, made with its options.

    Attributes:
        over: the feature network it is defined by; None: whichever the user chose.
        rows_of: the sets of which it takes every feature: "a", "ab" or none.
        needs: what its features must have beside vectors: `spatial` ones, or `classes`.
    """

    over: ClassVar[str | None] = None
    rows_of: ClassVar[str] = ""
    needs: ClassVar[str] = ""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def check(self, count_a: int, count_b: int) -> None:
        """Refuse, before anything is measured, sets of so many images (0: not known). Raises
        UsageError.
        """

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        """What it says of the set a, with b as the reference."""
        raise NotImplementedError


def score(
    name: str,
    title: str,
    value: float,
    *,
    sets: tuple[Statistics, Statistics],
    features: Features,
    deviation: float | None = None,
) -> Score:
    """A score over the features of two sets, named after them where they are not Inception's."""
    title += features.suffix
    return Score(
        name=name,
        title=title,
        value=value,
        features=features.name,
        count_a=sets[0].count,
        count_b=sets[1].count,
        deviation=deviation,
    )


@register("metric", "fid")
class Frechet(Metric):
    """Fréchet distance over the chosen features; over Inception's, FID (Heusel et al. 2017)."""

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        return [compare(a, b, features)]


@register("metric", "sfid")
class Sfid(Metric):
    """FID over Inception's spatial features (Nash et al. 2021), as ADM's evaluator has it."""

    needs = "spatial"

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        if a.spatial is None or b.spatial is None:
            return []
        value = frechet_distance(a.spatial, b.spatial, features.device)
        return [score("sfid", "sFID", value, sets=(a, b), features=features)]


class InceptionScoreOptions(Options):
    is_splits: int = Field(
        10, ge=1, description="The number of parts that the images are cut into."
    )
    is_order: Literal["shuffled", "files"] = Field(
        "shuffled",
        description="The order of the images: shuffled as torch-fidelity does, or in file order "
        "as in ADM's evaluator.",
    )


@register("metric", "is", InceptionScoreOptions)
class InceptionScore(Metric):
    """Inception Score (Salimans et al. 2016)."""

    rows_of = "a"
    needs = "classes"

    def check(self, count_a: int, count_b: int) -> None:
        if count_a:
            _check_splits(count_a, self.options["is_splits"])

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        if a.rows is None:
            return []
        probabilities = features.probabilities(a.rows)
        title = "Inception Score, in file order"
        if self.options["is_order"] == "shuffled":
            # In file order, class folders make every part one of few classes. The seed and the
            # generator are torch-fidelity's.
            order = np.random.RandomState(2020).permutation(len(probabilities))
            probabilities, title = probabilities[torch.from_numpy(order)], "Inception Score"
        value, deviation = inception_score(probabilities, self.options["is_splits"])
        return [score("is", title, value, sets=(a, b), features=features, deviation=deviation)]


class KidOptions(Options):
    kid_subsets: int = Field(
        100, ge=1, le=10_000, description="The number of random subsets that are compared."
    )
    kid_size: int = Field(
        1000, ge=2, description="The number of images of a subset, at most the smaller set's."
    )


@register("metric", "kid", KidOptions)
class Kid(Metric):
    """Kernel Inception distance (Binkowski et al. 2018)."""

    rows_of = "ab"

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        if a.rows is None or b.rows is None:
            return []
        subsets, size = self.options["kid_subsets"], self.options["kid_size"]
        value, deviation = kid(a.rows, b.rows, subsets=subsets, size=size, device=features.device)
        smaller, larger = sorted([len(a.rows), len(b.rows)])
        title = f"KID of subsets of {smaller:,}, for want of {size:,}" if smaller < size else "KID"
        # Subsets that are all the same, the whole of both sets, have no spread to tell of.
        spread = None if larger <= size and smaller == larger else deviation
        return [score("kid", title, value, sets=(a, b), features=features, deviation=spread)]


class PrdcOptions(Options):
    prdc_k: int = Field(3, ge=1, description="The number of neighbours for precision and recall.")
    prdc_k_density: int = Field(
        5, ge=1, description="The number of neighbours for density and coverage."
    )


@register("metric", "prdc", PrdcOptions)
class Prdc(Metric):
    """Precision, recall, density and coverage."""

    rows_of = "ab"

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        if a.rows is None or b.rows is None:
            return []
        k, k_density = self.options["prdc_k"], self.options["prdc_k_density"]
        found = prdc(a.rows, b.rows, k=k, k_density=k_density, device=features.device)
        return [
            score(name, name, value, sets=(a, b), features=features)
            for name, value in found.items()
        ]


@register("metric", "fd_dinov2")
class FrechetDinov2(Frechet):
    """Fréchet distance over DINOv2's features (Stein et al. 2023)."""

    over = "dinov2"


# ------------------------------------------------------------------ the mathematics


def compare(a: Statistics, b: Statistics, features: Features) -> Score:
    """The Fréchet distance between two sets' statistics."""
    value = frechet_distance(a.pooled, b.pooled, features.device)
    return Score(
        name=features.metric,
        title=features.title,
        value=value,
        features=features.name,
        count_a=a.count,
        count_b=b.count,
    )


def bootstrap_deviation(
    a: Tensor, b: Tensor, times: int, device: torch.device | str = "cpu"
) -> float:
    """The deviation of the Fréchet distance over `times` drawings of both sets [N, D] with
    replacement.

    A drawn set holds duplicates, which shifts its distance upwards: only the deviation tells
    something.
    """
    values = []
    for number in range(times):
        rng = numpy_stream(0, "bootstrap", number)
        drawn = []
        for rows in (a, b):
            chosen = torch.from_numpy(rng.integers(0, len(rows), len(rows)))
            drawn.append(Gaussian.fit(rows[chosen].to(device)))
        values.append(frechet_distance(drawn[0], drawn[1], device))
    return float(torch.tensor(values, dtype=torch.float64).std())


def inception_score(
    probabilities: Tensor, splits: int = 10, split_size: int | None = None
) -> tuple[float, float]:
    """exp of the mean KL divergence from the mean class distribution, per split: mean and
    population deviation.

    `probabilities` are [N, classes], cut in their order: into `splits` nearly equal parts
    (Salimans et al. 2016), or parts of `split_size`, the last one shorter (ADM's evaluator: 5000).
    Raises UsageError for splits of a single image.
    """
    p = probabilities.double()
    n = len(p)
    if split_size:
        parts = list(p.split(split_size))
    else:
        _check_splits(n, splits)
        parts = [p[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    divergence = []
    for part in parts:
        mean = part.mean(0)
        # xlogy: a probability of zero contributes nothing.
        within = torch.xlogy(part, part).sum(1).mean()
        divergence.append(within - torch.xlogy(mean, mean).sum())
    scores = torch.stack(divergence).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def _check_splits(count: int, splits: int) -> None:
    if count < 2 * splits:
        raise UsageError(
            f"the Inception Score of one image is always 1: {count} images cannot be cut into "
            f"metric.is_splits {splits} parts of two or more, give at most {count // 2}"
        )


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of [m, D] and [n, D] under (a.b / D + 1)^3 (Binkowski et al. 2018), in
    float64.
    """
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return float(own[0] + own[1] - 2 * xy.mean())


def kid(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Mean and population deviation of the MMD over random subsets of `size` (at most the smaller
    set's).
    """
    size = min(size, len(x), len(y))
    values = []
    for number in range(subsets):
        rng = numpy_stream(0, "kid", number)
        one = x[torch.from_numpy(rng.permutation(len(x))[:size])]
        two = y[torch.from_numpy(rng.permutation(len(y))[:size])]
        values.append(polynomial_mmd(one.to(device), two.to(device)))
    return float(np.mean(values)), float(np.std(values))
