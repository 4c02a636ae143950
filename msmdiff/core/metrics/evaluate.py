"""From two sets of images to scores."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import features as extractors
from msmdiff.core.metrics import statistics
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.frechet import Gaussian, frechet_distance
from msmdiff.core.metrics.inputs import Images, open_input
from msmdiff.core.metrics.prdc import prdc
from msmdiff.core.metrics.scores import inception_score, kid
from msmdiff.core.metrics.statistics import Moments, Statistics
from msmdiff.core.seeding import numpy_stream

METRICS = ("fid", "sfid", "is", "kid", "prdc", "fd_dinov2")
PAPERS = dict(splits=10, kid_subsets=100, kid_size=1000, k=3, k_density=5)
BIASED_BELOW = 10_000


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


@dataclass
class Pass:
    """One kind of features, the metrics over it, whether they take every feature of A and of B, and
    the statistics.
    """

    features: Features
    metrics: set[str]
    keep: tuple[bool, bool]
    sets: list[Statistics] = field(default_factory=list)


def of_images(
    batches: Iterable[Tensor],
    features: Features,
    progress: Callable[[int], None] = lambda done: None,
    settings: dict[str, str] | None = None,
    keep: bool = False,
) -> Statistics:
    """The statistics of uint8 batches [B, 3, H, W]; `progress` is told how many images are done.

    Where there are several processes, each gives its own batches, and all get the statistics of
    all.
    """
    pooled = Moments(features.width, features.device, keep)
    spatial = Moments(features.spatial_width, features.device) if features.spatial_width else None
    for batch in batches:
        vectors, second = features(batch)
        pooled.add(vectors)
        if spatial is not None and second is not None:
            spatial.add(second)
        progress(pooled.count)
    gaussian, rows = pooled.finish()
    known = features.settings() | (settings or {})
    return Statistics(gaussian, pooled.count, known, spatial.finish()[0] if spatial else None, rows)


def of_input(
    images: Images,
    features: Features,
    batch_size: int = 16,
    keep: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """The statistics of a set, of which every process takes a consecutive share, or those it has on
    disk.

    Of an `.npz` with both, distances are by its statistics and the rest by its images, as in ADM's
    evaluator.
    """
    stored = (
        images.stored
        if images.stored is not None and images.stored.width == features.width
        else None
    )
    if stored is not None and (stored.rows is not None or not keep):
        return stored
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank * len(images) // world, (rank + 1) * len(images) // world)
    batches = images.batches(share, batch_size)
    found = of_images(
        batches, features, lambda done: progress(done, len(share)), images.settings, keep
    )
    if world > 1:
        every: list[Any] = [None] * world
        dist.all_gather_object(every, images.bad)
        images.bad = {index: reason for bad in every for index, reason in bad.items()}
        images.unreadable()
    return found if stored is None else replace(stored, rows=found.rows)


def evaluate(
    a: Sequence[str],
    b: str | None,
    metrics: Sequence[str] = ("fid",),
    *,
    features: str = "inception",
    weights: Path | None = None,
    dinov2_weights: Path | None = None,
    resize: str | None = None,
    precision: str = "fp32",
    allow_mismatch: bool = False,
    batch_size: int = 16,
    bootstrap: int = 0,
    keep: bool = False,
    device: torch.device | str = "cpu",
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **opening: Any,
) -> tuple[list[list[Score]], list[Images], list[Pass]]:
    """Scores of each of the sets `a` against the reference `b`, the sets, and what was measured of
    them.

    Without `b` the sets are measured only. `resize` None means the rule of the statistics at hand;
    `keep` holds every feature, for a picture of the images; `opening` is for `open_input`. Whatever
    can be refused is, before the first image is measured. Raises UsageError for sets that do not
    compare, and MsmdiffError for images that cannot be read.
    """
    if unknown := set(metrics) - set(METRICS):
        raise UsageError(f"--metrics {','.join(sorted(unknown))}: choose from {', '.join(METRICS)}")
    if bootstrap == 1:
        raise UsageError(
            "--bootstrap 1: one drawing has no spread; give at least 2, or 0 for no interval"
        )
    for one, two in (
        [(Path(spec).resolve(), Path(b).resolve()) for spec in a] if b is not None else []
    ):
        if one.is_dir() and two.is_dir() and (one in two.parents or two in one.parents):
            raise UsageError(
                f"one of {one} and {two} lies in the other: compare two separate folders"
            )
        if one == two:
            note(f"note: both sides are the same, {b}: a distance to itself says nothing")
    sets = [
        open_input(spec, device=device, **opening) for spec in ([*a, b] if b is not None else a)
    ]
    if keep and (bare := [images.spec for images in sets if not len(images)]):
        raise UsageError(f"--plot shows images: {bare[0]} holds statistics only")
    here, keep, passes = set(metrics) - {"fd_dinov2"}, keep or bootstrap > 0, []
    if here:  # statistics are looked at first: features may have to be downloaded
        for spec, name in [
            (s.spec, s.stored.settings.get("features", "")) for s in sets if s.stored and not len(s)
        ]:
            needs = next(
                (kind for kind, start in extractors.PREFIXES.items() if name.startswith(start)),
                features,
            )
            if needs != features:
                raise UsageError(
                    f"{spec} holds statistics of {name}: it needs --features {needs}, "
                    f"not {features}"
                )
        if features == "inception" and resize is None:
            rules = [
                s.stored.settings["resize"]
                for s in sets
                if s.stored and "resize" in s.stored.settings
            ]
            resize = rules[-1] if rules else None
        rows = keep or bool({"kid", "prdc"} & here)
        made = extractors.build(features, weights, device, resize, precision, here)
        passes.append(Pass(made, here, (rows or "is" in here, rows)))
    if "fd_dinov2" in metrics and not (here and features == "dinov2"):
        file = dinov2_weights or (weights if features == "dinov2" else None)
        passes.append(Pass(extractors.build("dinov2", file, device), {"fid"}, (keep, keep)))
    for each in passes:
        for images in sets:
            if differ := check(
                images, sets[-1], each.features, each.keep[images is sets[-1]], allow_mismatch
            ):
                note(f"note: {images.spec} and {b} differ in {differ}; compared all the same")
    for images in sets:
        if images.stored is not None and images.stored.assumed:
            known = ", ".join(images.stored.settings.values())
            note(f"note: {images.spec} does not say how it was made; going by its layout: {known}")
    for each in passes:
        for images in sets:
            each.sets.append(
                of_input(images, each.features, batch_size, each.keep[images is sets[-1]], progress)
            )
    for images in sets:
        if bad := images.unreadable():
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            note(
                f"left out: {len(bad)} of {len(images)} images in {images.spec}: "
                f"{'; '.join(bad[:5])}{more}"
            )
    compared = range(len(a) if b is not None else 0)
    return (
        [[s for p in passes for s in scores(p.sets[i], p, bootstrap)] for i in compared],
        sets,
        passes,
    )


def check(
    images: Images, reference: Images, features: Features, keep: bool = False, allow: bool = False
) -> str:
    """How a set was measured otherwise than the reference; raises UsageError for that, unless
    `allow`ed.

    Also where the set is of statistics that are not of these features, or without what `keep` or
    sFID needs.
    """
    known, wanted = (
        x.stored.settings
        if x.stored and (x.stored.width == features.width or not len(x))
        else features.settings() | x.settings
        for x in (images, reference)
    )
    differ, stored, problem = "; ".join(statistics.differences(known, wanted)), images.stored, ""
    if stored is not None and not len(images) and stored.width != features.width:
        problem = (
            f"holds statistics of {stored.width} {known.get('features', 'unnamed')} features, "
            "which do not compare "
            f"with {features.name} ({features.width}): choose --features and --weights to suit"
        )
    elif differ and not allow:
        problem = f"differs from {reference.spec} in {differ}: --allow-mismatch compares them"
    elif (
        stored is not None and not len(images) and features.spatial_width and stored.spatial is None
    ):
        problem = "holds no spatial statistics (`mu_s`, `sigma_s`), which sfid needs"
    elif stored is not None and not len(images) and keep and stored.rows is None:
        problem = (
            "holds statistics only, but kid, prdc, is, --bootstrap and --plot need images, or "
            "statistics made with "
            "the same --metrics, which keep every feature"
        )
    if problem:
        raise UsageError(f"{images.spec} {problem}")
    return differ


def scores(a: Statistics, each: Pass, times: int = 0) -> list[Score]:
    """Every metric of a pass, of `a` against the pass's last set; `times` is of the bootstrap."""
    features, b, out = each.features, each.sets[-1], list[Score]()

    def add(name: str, title: str, value: float, deviation: float | None = None) -> None:
        out.append(
            Score(name, title + features.suffix, value, features.name, a.count, b.count, deviation)
        )

    if "fid" in each.metrics:
        out.append(compare(a, b, features))
        if times and a.rows is not None and b.rows is not None:
            spread = 1.96 * bootstrap_deviation(a.rows, b.rows, times, features.device)
            out[0].interval = (max(0.0, out[0].value - spread), out[0].value + spread)
    if "sfid" in each.metrics and a.spatial is not None and b.spatial is not None:
        add("sfid", "sFID", frechet_distance(a.spatial, b.spatial, features.device))
    if "is" in each.metrics and a.rows is not None:
        add(
            "is",
            "Inception Score",
            *inception_score(features.probabilities(a.rows), PAPERS["splits"]),
        )
    if "kid" in each.metrics and a.rows is not None and b.rows is not None:
        add(
            "kid",
            "KID",
            *kid(a.rows, b.rows, PAPERS["kid_subsets"], PAPERS["kid_size"], features.device),
        )
    if "prdc" in each.metrics and a.rows is not None and b.rows is not None:
        for name, value in prdc(
            a.rows, b.rows, PAPERS["k"], PAPERS["k_density"], features.device
        ).items():
            add(name, name, value)
    return out


def compare(a: Statistics, b: Statistics, features: Features) -> Score:
    """The Fréchet distance between two sets' statistics."""
    value = frechet_distance(a.pooled, b.pooled, features.device)
    return Score(features.metric, features.title, value, features.name, a.count, b.count)


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
        one, two = (
            Gaussian.fit(x[torch.from_numpy(rng.integers(0, len(x), len(x)))].to(device))
            for x in (a, b)
        )
        values.append(frechet_distance(one, two, device))
    return float(torch.tensor(values, dtype=torch.float64).std())
