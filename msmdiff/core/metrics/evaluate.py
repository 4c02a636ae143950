"""From two sets of images to scores."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.errors import MsmdiffError, UsageError, nearest
from msmdiff.core.metrics import features as extractors
from msmdiff.core.metrics import statistics
from msmdiff.core.metrics.features import Features, validated
from msmdiff.core.metrics.inputs import Images, open_input
from msmdiff.core.metrics.scores import Metric, Score, bootstrap_deviation
from msmdiff.core.metrics.statistics import Moments, Statistics

BIASED_BELOW = 10_000
"""Fewer images than this bias a Fréchet distance upwards."""


@dataclass
class Settings:
    """How sets are compared.

    Attributes:
        metrics: registered names.
        features: the feature network of the metrics that have none of their own.
        weights, dinov2_weights: its file, and DINOv2's beside another one.
        feature_options: of the feature network; those left out follow the statistics at hand.
        metric_options: of the metrics, by their flat names.
        allow_mismatch: compare sets that were measured differently.
        bootstrap: resamples for an interval; 0 for none.
        keep_rows: hold every feature, for a picture of the images.
        device, note, progress: where it runs, and what is told of it.
    """

    metrics: Sequence[str] = ("fid",)
    features: str = "inception"
    weights: Path | None = None
    dinov2_weights: Path | None = None
    feature_options: Mapping[str, Any] = field(default_factory=dict)
    metric_options: Mapping[str, Any] = field(default_factory=dict)
    allow_mismatch: bool = False
    batch_size: int = 16
    bootstrap: int = 0
    keep_rows: bool = False
    device: torch.device | str = "cpu"
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int], None] = lambda done, total: None


@dataclass
class Pass:
    """One kind of features, the metrics over it, whether they take every feature of A and of B, and
    the statistics.
    """

    features: Features
    metrics: list[Metric]
    keep_rows: tuple[bool, bool]
    sets: list[Statistics] = field(default_factory=list)


def of_images(
    batches: Iterable[Tensor],
    features: Features,
    progress: Callable[[int], None] = lambda done: None,
    settings: dict[str, str] | None = None,
    keep_rows: bool = False,
    name: Callable[[int], str] = "image {}".format,
) -> Statistics:
    """The statistics of uint8 batches [B, 3, H, W]; `progress` is told how many images are done.

    Where there are several processes, each gives its own batches, and all get the statistics of
    all. Raises MsmdiffError for features that are not finite, with the `name` of the image by its
    place.
    """
    pooled = Moments(features.width, features.device, keep_rows)
    spatial = Moments(features.spatial_width, features.device) if features.spatial_width else None
    for batch in batches:
        vectors, second = features(batch)
        every = vectors if second is None else torch.cat([vectors, second], dim=1)
        if not (finite := every.isfinite().all(1)).all():
            bad = name(pooled.count + int((~finite).nonzero()[0]))
            raise MsmdiffError(
                f"{features.name} features of {bad} are not finite numbers: look at that image, or "
                "at the weights"
            )
        pooled.add(vectors)
        if spatial is not None and second is not None:
            spatial.add(second)
        progress(pooled.count)
    gaussian, rows = pooled.finish()
    known = features.settings() | (settings or {})
    return Statistics(
        pooled=gaussian,
        count=pooled.count,
        settings=known,
        spatial=spatial.finish()[0] if spatial else None,
        rows=rows,
    )


def of_input(
    images: Images,
    features: Features,
    batch_size: int = 16,
    keep_rows: bool = False,
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
    if stored is not None and (stored.rows is not None or not keep_rows):
        return stored
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank * len(images) // world, (rank + 1) * len(images) // world)
    batches = images.batches(share, batch_size)
    found = of_images(
        batches=batches,
        features=features,
        progress=lambda done: progress(done, len(share)),
        settings=images.settings,
        keep_rows=keep_rows,
        name=lambda place: _name_of(images, share, place),
    )
    if world > 1:
        every: list[Any] = [None] * world
        dist.all_gather_object(every, images.bad)
        images.bad = {index: reason for bad in every for index, reason in bad.items()}
        images.unreadable()
    return found if stored is None else replace(stored, rows=found.rows)


def _name_of(images: Images, share: Sequence[int], place: int) -> str:
    """What the image is called that is so many readable ones into a share."""
    index = [i for i in share if i not in images.bad][place]
    source = getattr(images, "source", None)  # of files; what is drawn goes by its seed
    return f"{images.spec}, " + (f"seed {index}" if source is None else source.name(index))


def evaluate(
    a: Sequence[str], b: str | None, settings: Settings | None = None, **opening: Any
) -> tuple[list[list[Score]], list[Images], list[Pass]]:
    """Scores of each of the sets `a` against the reference `b`, the sets, and what was measured of
    them.

    Without `b` the sets are measured only. `opening` is for `open_input`. Whatever can be refused
    is, before the first image is measured. Raises UsageError for sets that do not compare, and
    MsmdiffError for images that cannot be read.
    """
    how = settings or Settings()
    metrics = choose(how)
    if how.bootstrap == 1:
        raise UsageError(
            "--bootstrap 1: one drawing has no spread; give at least 2, or 0 for no interval"
        )
    if b is not None:
        _compare_places(a, b, how)
    specs = [*a, b] if b is not None else list(a)
    sets = [open_input(spec, device=how.device, **opening) for spec in specs]
    if how.keep_rows and (bare := [images.spec for images in sets if not len(images)]):
        raise UsageError(f"--plot shows images: {bare[0]} holds statistics only")
    passes = _passes(metrics, sets, how)
    for metric in metrics:
        for images in sets[:-1] if b is not None else []:
            metric.check(_count(images), _count(sets[-1]))
    for each in passes:
        for images in sets:
            keep_rows = each.keep_rows[images is sets[-1]]
            if differ := check(
                images, sets[-1], each.features, keep_rows=keep_rows, allow=how.allow_mismatch
            ):
                how.note(f"note: {images.spec} and {b} differ in {differ}; compared all the same")
    _tell_assumptions(sets, how)
    for each in passes:
        for images in sets:
            keep_rows = each.keep_rows[images is sets[-1]]
            found = of_input(
                images, each.features, how.batch_size, keep_rows=keep_rows, progress=how.progress
            )
            each.sets.append(found)
    _tell_unreadable(sets, how)
    if b is None:
        return [], sets, passes
    results = [_scores(i, passes, how.bootstrap) for i in range(len(a))]
    return results, sets, passes


def _count(images: Images) -> int:
    """How many images a set has, 0 where it is not known."""
    return len(images) or (images.stored.count if images.stored else 0)


def choose(how: Settings) -> list[Metric]:
    """The metrics that were asked for, with their options.

    They come in the registry's order, whatever the order of the names: the first score is the
    headline. Raises UsageError for an unknown name or option, and for an option of a metric that
    was not asked for.
    """
    for name in how.metrics:
        registry.find("metric", name, "--metrics")
    known = registry.entries("metric").values()
    entries = [entry for entry in known if entry.name in how.metrics]
    taken = {key for entry in entries for key in entry.options.model_fields}
    if unknown := [key for key in how.metric_options if key not in taken]:
        near = nearest(unknown[0], sorted(taken))
        asked = ", ".join(how.metrics)
        raise UsageError(f"--set metric.{unknown[0]} has no effect on --metrics {asked}{near}")
    made = []
    for entry in entries:
        given = {k: v for k, v in how.metric_options.items() if k in entry.options.model_fields}
        options = validated(entry, given, "metric")
        made.append(entry.make(**options))
    return made


def _compare_places(a: Sequence[str], b: str, how: Settings) -> None:
    for spec in a:
        one, two = Path(spec).resolve(), Path(b).resolve()
        if one.is_dir() and two.is_dir() and (one in two.parents or two in one.parents):
            raise UsageError(
                f"one of {one} and {two} lies in the other: compare two separate folders"
            )
        if one == two:
            how.note(f"note: both sides are the same, {b}: a distance to itself says nothing")


def _passes(metrics: Sequence[Metric], sets: Sequence[Images], how: Settings) -> list[Pass]:
    """One pass for each feature network that the metrics are over, the chosen one first."""
    by_network: dict[str, list[Metric]] = {}
    if any(metric.over in (None, how.features) for metric in metrics):
        by_network[how.features] = []
    for metric in metrics:
        by_network.setdefault(metric.over or how.features, []).append(metric)
    passes = []
    for kind, over in by_network.items():
        # Statistics are looked at first: features may have to be downloaded.
        if kind == how.features and any(metric.over is None for metric in over):
            _check_stored(sets, how)
        everything = how.keep_rows or how.bootstrap > 0
        rows_a = everything or any("a" in metric.rows_of for metric in over)
        rows_b = everything or any("b" in metric.rows_of for metric in over)
        made = _features(kind, over, sets, how)
        passes.append(Pass(made, over, (rows_a, rows_b)))
    return passes


def _features(kind: str, over: Sequence[Metric], sets: Sequence[Images], how: Settings) -> Features:
    needs = frozenset(metric.needs for metric in over if metric.needs)
    if kind != how.features:
        own = how.dinov2_weights if kind == "dinov2" else None
        return extractors.build(kind, own, how.device, needs=needs)
    weights = how.weights
    if kind == "dinov2":
        weights = how.dinov2_weights or weights
    options = dict(how.feature_options)
    known = sets[-1].stored
    measured = any(len(images) for images in sets) or weights is not None or "classes" in needs
    if known is not None and not measured and _kind(known) == kind:
        # Where the reference has no spatial features they are asked for all the same, and missed.
        widths = (known.width, len(known.spatial.mean) if known.spatial is not None else 1)
        return extractors.recorded(kind, known.settings, widths, how.device, needs=needs, **options)
    if options.get("resize") is None and kind == "inception":
        stored = [s.stored.settings for s in sets if s.stored and "resize" in s.stored.settings]
        options["resize"] = stored[-1]["resize"] if stored else None
    return extractors.build(kind, weights, how.device, needs=needs, **options)


def _kind(stored: Statistics) -> str | None:
    """Which feature network statistics are of, by its registered name."""
    return extractors.kind_of(stored.settings.get("features", ""))


def _check_stored(sets: Sequence[Images], how: Settings) -> None:
    """Raises UsageError for statistics of other features than the chosen ones."""
    for images in sets:
        if images.stored is None:
            continue
        name = images.stored.settings.get("features", "")
        if len(images):
            # Statistics of unknown features: the images say what they are.
            images.stored = images.stored if name else None
            continue
        kind = _kind(images.stored) or how.features
        if kind != how.features:
            raise UsageError(
                f"{images.spec} holds statistics of {name}: it needs --features {kind}, not "
                f"{how.features}"
            )


def _tell_assumptions(sets: Sequence[Images], how: Settings) -> None:
    for images in sets:
        if images.stored is not None and images.stored.assumed:
            known = ", ".join(images.stored.settings.values())
            how.note(
                f"note: {images.spec} does not say how it was made; going by its layout: {known}"
            )


def _tell_unreadable(sets: Sequence[Images], how: Settings) -> None:
    for images in sets:
        if bad := images.unreadable():
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            how.note(
                f"left out: {len(bad)} of {len(images)} images in {images.spec}: "
                f"{'; '.join(bad[:5])}{more}"
            )


def _scores(number: int, passes: Sequence[Pass], times: int) -> list[Score]:
    """Every metric of every pass, of one set against the last one; `times` is of the bootstrap."""
    found: dict[str, Score] = {}
    for each in passes:
        a, b = each.sets[number], each.sets[-1]
        for metric in each.metrics:
            for score in metric.scores(a, b, each.features):
                if times and score.name == each.features.metric:
                    score.interval = _interval(score, a, b, times)
                found.setdefault(score.name, score)
    return list(found.values())


def _interval(score: Score, a: Statistics, b: Statistics, times: int) -> tuple[float, float] | None:
    if a.rows is None or b.rows is None:
        return None
    spread = 1.96 * bootstrap_deviation(a.rows, b.rows, times, a.pooled.mean.device)
    return max(0.0, score.value - spread), score.value + spread


def check(
    images: Images,
    reference: Images,
    features: Features,
    keep_rows: bool = False,
    allow: bool = False,
) -> str:
    """How a set was measured otherwise than the reference; raises UsageError for that, unless
    `allow`ed.

    Also where the set is of statistics that are not of these features, or without what `keep_rows`
    or sFID needs.
    """
    known, wanted = _known(images, features), _known(reference, features)
    differ = "; ".join(statistics.differences(known, wanted))
    bare = None if len(images) else images.stored  # statistics that no images can make up for
    if bare is not None and bare.width != features.width:
        raise UsageError(
            f"{images.spec} holds statistics of {bare.width} {known.get('features', 'unnamed')} "
            f"features, which do not compare with {features.name} ({features.width}): choose "
            "--features and --weights to suit"
        )
    if bare is not None and "features" not in bare.settings and not allow:
        raise UsageError(
            f"{images.spec} holds statistics of {bare.width} unnamed features, which may be others "
            f"than {features.name}: measure the images again, or --allow-mismatch takes them for "
            "these"
        )
    if differ and not allow:
        raise UsageError(
            f"{images.spec} differs from {reference.spec} in {differ}: --allow-mismatch compares "
            "them"
        )
    if bare is not None and features.spatial_width and bare.spatial is None:
        raise UsageError(
            f"{images.spec} holds no spatial statistics (`mu_s`, `sigma_s`), which sfid needs"
        )
    if bare is not None and keep_rows and bare.rows is None:
        raise UsageError(
            f"{images.spec} holds statistics only, but metrics such as kid, prdc and is, "
            "--bootstrap and --plot need images, or statistics made with the same --metrics, "
            "which keep every feature"
        )
    return differ


def _known(images: Images, features: Features) -> dict[str, str]:
    """The settings of a set's statistics, stored or still to be measured."""
    stored = images.stored
    if stored is not None and (stored.width == features.width or not len(images)):
        return stored.settings
    return features.settings() | images.settings
