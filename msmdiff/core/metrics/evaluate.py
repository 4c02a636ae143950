"""From two sets of images to a distance."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msmdiff.core.data import images, sources
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import statistics
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.frechet import frechet_distance
from msmdiff.core.metrics.statistics import Moments, Statistics


@dataclass
class Score:
    """A distance and what it was measured on."""

    title: str
    value: float
    features: str
    count_a: int
    count_b: int


def of_images(
    batches: Iterable[Tensor], features: Features, progress: Callable[[int], None] = lambda done: None
) -> Statistics:
    """The statistics of uint8 batches [B, 3, H, W]; `progress` is told how many images are done."""
    moments = Moments(features.width)
    for batch in batches:
        moments.add(features(batch).double().cpu().numpy())
        progress(moments.count)
    return moments.statistics(features.name)


def of_source(
    spec: str, features: Features, batch_size: int = 50, progress: Callable[[int, int], None] = lambda done, total: None
) -> Statistics:
    """The statistics of a folder, zip, `.npz` of images or `.npz` of statistics; `progress` is told (done, total).

    Raises UsageError for statistics of other features, and MsmdiffError for unreadable images or different sizes.
    """
    if spec.lower().endswith(".npz") and Path(spec).is_file():
        stored = statistics.load(Path(spec))
        if stored is not None:
            if len(stored.mean) != features.width or stored.features not in ("", features.name):
                raise UsageError(
                    f"{spec} holds statistics of {len(stored.mean)} {stored.features or 'unnamed'} features, which "
                    f"do not compare with {features.name} ({features.width}): choose --features and --weights to suit"
                )
            return stored
    source = sources.open_source(spec, "none")
    return of_images(read_all(source, batch_size), features, lambda done: progress(done, len(source)))


def read_all(source: sources.Source, batch_size: int) -> Iterator[Tensor]:
    """Every image of a source in order, decoded in threads: uint8 [B, 3, H, W]."""
    size: tuple[int, ...] | None = None
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(source), batch_size):
            indices = range(start, min(start + batch_size, len(source)))
            pixels = list(pool.map(lambda i: _read(source, i), indices))
            for index, image in zip(indices, pixels, strict=True):
                size = size or image.shape
                if image.shape != size:
                    raise MsmdiffError(
                        f"{source.spec} mixes sizes: {source.describe(index).split(' (')[0]} is {image.shape[1]}x"
                        f"{image.shape[0]}, the first is {size[1]}x{size[0]}; resize them to one size"
                    )
            yield torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())


def _read(source: sources.Source, index: int) -> np.ndarray:
    try:
        return np.asarray(source.read(index))
    except images.UNREADABLE as error:
        name = source.describe(index).split(" (")[0]
        bad = sources.unreadable(source)
        raise MsmdiffError(
            f"{len(bad)} of {len(source)} images in {source.spec} cannot be read, the first is {name} ({error}): "
            "repair or remove them"
        ) from None


def compare(a: Statistics, b: Statistics, features: Features) -> Score:
    """The Fréchet distance between two sets' statistics."""
    return Score(features.title, frechet_distance(a.mean, a.cov, b.mean, b.cov), features.name, a.count, b.count)
