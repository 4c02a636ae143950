"""From a source to batches on the host: checking, decoding, cropping, caching, worker processes."""

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msmdiff.core import files
from msmdiff.core.data import images, sources
from msmdiff.core.data.latents import Latents, Packed
from msmdiff.core.data.order import Chunks, images_at
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import DataConfig
from msmdiff.core.seeding import numpy_stream

CACHE_BYTES = 512 * 2**20
"""Centre-cropped data sets up to this size are kept decoded in memory, and then need no worker
processes.
"""


@dataclass
class Batch:
    """What a training step takes.

    Attributes:
        position: the first place in the training sequence.
        images: what a codec's `encode` takes, uint8 [B, 3, H, W] or packed; [B, 2, ...] where each
            comes with its mirror image.
        y: what the network is told: class indices int64 [B], the features of captions [B, tokens,
            width], or None.
    """

    position: int
    images: Tensor
    y: Tensor | None

    def pin_memory(self) -> "Batch":
        y = self.y.pin_memory() if self.y is not None else None
        return Batch(self.position, self.images.pin_memory(), y)

    def __reduce__(self) -> Any:
        # To another process as arrays, which go through a pipe. Tensors would go through /dev/shm,
        # of which Docker gives 64 MB; torch waits without end where it is full.
        y = self.y.numpy() if self.y is not None else None
        return _batch_of_arrays, (self.position, self.images.numpy(), y)


def _batch_of_arrays(position: int, images: np.ndarray, y: np.ndarray | None) -> Batch:
    return Batch(position, torch.from_numpy(images), None if y is None else torch.from_numpy(y))


def flip(images: Tensor, flipped: Tensor | None) -> Tensor:
    """A batch's images, mirrored where `flipped` [B] says so: by their packed mirror images where
    there are any.
    """
    plain = images[:, 0] if images.ndim == 5 else images
    if flipped is None:
        return plain
    mirrored = images[:, 1] if images.ndim == 5 else images.flip(-1)
    return torch.where(flipped[:, None, None, None], mirrored, plain)


class TrainingImages(Dataset):
    """Images by position in the training sequence, resized and cropped as ADM does, or encoded ones
    as they are.

    Args:
        source: the images.
        config: the `data` section.
        seed: of the order and of the random crops.
    """

    def __init__(self, source: Source, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed
        size = config.image_size
        bytes_needed = len(source) * 3 * size**2
        encoded, fits = (
            isinstance(source, Latents),
            config.crop == "center" and bytes_needed <= CACHE_BYTES,
        )
        self.cached = isinstance(source, Packed) or (fits and not encoded and not config.workers)
        self._cache = (
            np.empty((len(source), 3, size, size), np.uint8)
            if self.cached and not encoded
            else None
        )
        self._filled = np.zeros(len(source), bool)

    def __getitems__(self, positions: list[int]) -> "Batch | MsmdiffError":
        """The batch at these positions; an error as a value, since one raised in a worker arrives
        as a traceback.
        """
        try:
            return self._batch(positions)
        except MsmdiffError as error:
            return error

    def _batch(self, positions: list[int]) -> Batch:
        indices = images_at(self.seed, len(self.source), positions)
        if isinstance(self.source, Latents):
            entries, labels = self.source.gather(indices)
            if self.source.captioned:
                labels = self.source.context(
                    indices, numpy_stream(self.seed, "caption", positions[0])
                )
            return Batch(positions[0], entries, labels)
        pixels = self._pixels(indices, positions)
        labels = (
            None if self.source.labels is None else torch.from_numpy(self.source.labels[indices])
        )
        return Batch(positions[0], torch.from_numpy(pixels), labels)

    def _pixels(self, indices: np.ndarray, positions: list[int]) -> np.ndarray:
        """The images at these positions, uint8 [B, 3, H, W]."""
        if self._cache is None:
            every = [self._image(i, p) for i, p in zip(indices, positions, strict=True)]
            return np.stack(every).transpose(0, 3, 1, 2).copy()
        for index in indices[~self._filled[indices]]:
            image = self.source.image(index)
            pixels = images.center_crop(image, self.config.image_size)  # [H, W, 3]
            self._cache[index] = pixels.transpose(2, 0, 1)
            self._filled[index] = True
        return self._cache[indices]

    def _image(self, index: int, position: int) -> np.ndarray:
        image = self.source.image(index)
        if self.config.crop == "random":
            return images.random_crop(
                image, self.config.image_size, numpy_stream(self.seed, "crop", position)
            )
        return images.center_crop(image, self.config.image_size)

    def sample(self, count: int, purpose: str = "measure") -> Iterator[Tensor]:
        """Up to `count` distinct images in batches of 64, chosen by the seed: uint8 [B, 3, H, W],
        or packed.
        """
        order = numpy_stream(self.seed, purpose).permutation(len(self.source))[:count]
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            yield (
                flip(self.source.gather(chunk)[0], None)
                if isinstance(self.source, Latents)
                else self.crops(chunk)
            )

    def context(self, count: int) -> Tensor | None:
        """Features of captions of the first `count` entries, [count, tokens, width], where training
        reads those.
        """
        if not isinstance(self.source, Latents) or not self.source.captioned:
            return None
        return self.source.context(
            np.arange(count) % len(self.source), numpy_stream(self.seed, "preview")
        )

    def crops(self, indices: Iterable[int]) -> Tensor:
        """The centre crops of the images at `indices`: uint8 [B, 3, H, W]."""
        return center_crops(self.source, indices, self.config.image_size)


def center_crops(source: Source, indices: Iterable[int], size: int) -> Tensor:
    """The images of a source at `indices`, resized and cropped as ADM does: uint8 [B, 3, size,
    size]. Raises Unreadable.
    """
    pixels = np.stack([images.center_crop(source.image(int(i)), size) for i in indices])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def default_workers() -> int:
    """As many decoding processes as help."""
    return max(1, min(8, (os.cpu_count() or 2) - 1))


def batches(dataset: TrainingImages, chunks: Chunks, pin_memory: bool) -> Iterator[Batch]:
    """The endless stream of a process's batches."""
    workers = dataset.config.workers
    if workers is None:
        workers = 0 if dataset.cached else default_workers()
    return through_workers(dataset, chunks, workers, pin_memory=pin_memory)


# ------------------------------------------------------------------ worker processes

PATIENCE = 600
"""Seconds that a batch is waited for: a file that never comes (a dead network disk) ends a command.
"""

LOOK_EVERY = 5
"""Seconds after which the workers are looked after, while a batch is waited for."""


def through_workers(
    dataset: Any, chunks: Iterable[list[int]], workers: int, *, pin_memory: bool = False
) -> Iterator[Any]:
    """`dataset.__getitems__(chunk)` for every chunk, in order, made by so many processes (0: here).

    What it returns must travel without tensors, as arrays (see `Batch.__reduce__`). Raises the
    MsmdiffError that comes in a batch's place, and RuntimeError "DataLoader ..." for a worker that
    the system ended or that makes nothing for PATIENCE seconds; `console` has the sentence.
    """
    others = multiprocessing.active_children()
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=chunks,
            collate_fn=_as_is,
            worker_init_fn=_leave_signals_to_the_parent,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            timeout=min(LOOK_EVERY, PATIENCE) if workers else 0,
            pin_memory=pin_memory,
        )
    )
    started = [child for child in multiprocessing.active_children() if child not in others]
    try:
        for batch in _patiently(loader):
            if isinstance(batch, MsmdiffError):
                raise batch
            yield batch
    finally:
        # Asks the workers to stop; one that is stuck in a file, deaf to signals, would stay.
        del loader
        for worker in started:
            worker.kill()


def _patiently(loader: Iterator[Any]) -> Iterator[Any]:
    """The batches of a loader that gives up every LOOK_EVERY seconds: then torch looks whether its
    workers live, whose end it is told of by a signal, which Python may lose.
    """
    waited = 0.0
    while True:
        try:
            batch = next(loader)
        except StopIteration:
            return
        except RuntimeError as error:
            waited += LOOK_EVERY
            if waited >= PATIENCE or not str(error).startswith("DataLoader timed out"):
                raise
            continue
        waited = 0.0
        yield batch


def _as_is(batch: Any) -> Any:
    """The data sets make whole batches."""
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal's group; the trainer still needs its batches to end
    # the step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ------------------------------------------------------------------ checking


def open_training(config: DataConfig, report: Callable[[str], None]) -> Source:
    """Open a data set for training and decode every image of it once, unless that was done before.

    Unreadable images stop the training by name, or are left out when `data.skip_unreadable` is set;
    what was left out is reported. The verdict is remembered per listing (names, sizes, times) in
    the user's cache folder.
    """
    source = sources.open_configured(config)
    if source.unlabelled:
        report(f"note: {config.source} has {source.unlabelled}")
    if not config.verify or source.verified or isinstance(source, Latents):
        return source
    bad = _verdict(source, report)
    if not bad:
        return source
    listed = [f"{source.name(i)} ({reason})" for i, reason in list(bad.items())[:5]]
    summary = f"{len(bad)} of {len(source)} images in {config.source} cannot be read: "
    summary += "; ".join(listed) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    if not config.skip_unreadable:
        raise MsmdiffError(
            f"{summary}. Repair or remove them, or leave them out: --set "
            "data.skip_unreadable=true where training, "
            "--skip-unreadable where packing"
        )
    if len(bad) == len(source):
        raise MsmdiffError(summary)
    report(f"left out: {summary}")
    return sources.Subset(source, [i for i in range(len(source)) if i not in bad])


def _verdict(source: Source, report: Callable[[str], None]) -> dict[int, str]:
    """The images that cannot be read, and why: looked at now, or remembered.

    What failed is looked at again each time, and nothing is remembered where the disk failed and
    not a file: a repair need not change a name, a size or a time.
    """
    listing = "\n".join(source.describe(i) for i in range(len(source)))
    digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()[:32]
    place = cache_folder() / "verified" / f"{digest}.json"
    failed = _remembered(place, len(source))
    if failed is None and len(source) > 10_000:
        report(
            f"checking all {len(source):,} images of {source.spec} once "
            "(data.verify=false skips this)"
        )
    errors = sources.survey(source, failed)[0]
    bad = {index: files.reason(error) for index, error in errors.items()}
    if failed != list(bad) and not any(files.passing(error) for error in errors.values()):
        # A cache that cannot be written costs the next start some time, nothing else.
        with suppress(MsmdiffError):
            files.write_json(place, bad)
    return bad


def _remembered(place: Path, count: int) -> list[int] | None:
    """The images that could not be read when all were looked at; None where that is not known."""
    try:
        failed = [int(index) for index in json.loads(files.read_text(place))]
    except (MsmdiffError, ValueError, TypeError, RecursionError):
        return None
    return failed if all(0 <= index < count for index in failed) else None


def cache_folder() -> Path:
    """Where things that can be made again are kept: MSMDIFF_CACHE, or ~/.cache/msmdiff.

    Raises UsageError for a user without a home (a container's number without a name).
    """
    if given := os.environ.get("MSMDIFF_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "msmdiff"
    except RuntimeError:
        raise UsageError("there is no home folder for a cache: set HOME or MSMDIFF_CACHE") from None
