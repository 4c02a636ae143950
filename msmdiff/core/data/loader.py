"""From a source to batches on the host: decoding, cropping, caching, worker processes."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msmdiff.core import files
from msmdiff.core.data import images
from msmdiff.core.data.latents import Latents, Packed
from msmdiff.core.data.order import Chunks, images_at
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError
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
        left_out: sentences on images that could not be read, in whose place stands the next one.
    """

    position: int
    images: Tensor
    y: Tensor | None
    left_out: tuple[str, ...] = ()

    def pin_memory(self) -> "Batch":
        y = self.y.pin_memory() if self.y is not None else None
        return Batch(self.position, self.images.pin_memory(), y, self.left_out)

    def __reduce__(self) -> Any:
        # To another process as arrays, which go through a pipe. Tensors would go through /dev/shm,
        # of which Docker gives 64 MB; torch waits without end where it is full.
        y = self.y.numpy() if self.y is not None else None
        return _batch_of_arrays, (self.position, self.images.numpy(), y, self.left_out)


def _batch_of_arrays(
    position: int, images: np.ndarray, y: np.ndarray | None, left_out: tuple[str, ...]
) -> Batch:
    told = None if y is None else torch.from_numpy(y)
    return Batch(position, torch.from_numpy(images), told, left_out)


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
        self._instead: dict[int, int] = {}  # of images that could not be read

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
        left_out: list[str] = []
        pixels, indices = self._pixels(indices, positions, left_out)
        labels = (
            None if self.source.labels is None else torch.from_numpy(self.source.labels[indices])
        )
        return Batch(positions[0], torch.from_numpy(pixels), labels, tuple(left_out))

    def _pixels(
        self, indices: np.ndarray, positions: list[int], left_out: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The images at these positions, uint8 [B, 3, H, W], and which ones they are [B]."""
        indices = np.array([self._instead.get(i, i) for i in indices.tolist()], np.int64)
        if self._cache is None:
            every = []
            for place, position in enumerate(positions):
                indices[place], image = self._readable(int(indices[place]), left_out)
                every.append(self._cropped(image, position))
            return np.stack(every).transpose(0, 3, 1, 2).copy(), indices
        for place in np.flatnonzero(~self._filled[indices]).tolist():
            index, image = self._readable(int(indices[place]), left_out)
            indices[place] = index
            if not self._filled[index]:
                pixels = images.center_crop(image, self.config.image_size)  # [H, W, 3]
                self._cache[index] = pixels.transpose(2, 0, 1)
                self._filled[index] = True
        return self._cache[indices], indices

    def _readable(self, index: int, left_out: list[str]) -> tuple[int, Image.Image]:
        """The image at an index; or, where unreadable ones are left out (`data.skip_unreadable`),
        the next one that can be read, so that the same data always make the same batches.

        Raises Unreadable.
        """
        count = len(self.source)
        first = self._instead.get(index, index)
        for step in range(count):
            at = (first + step) % count
            try:
                image = self.source.image(at)
            except MsmdiffError as error:
                # What may be readable at the next start must not be another image then.
                if not self.config.skip_unreadable or files.passing(error) or count == 1:
                    raise
                left_out.append(str(error))
                continue
            if at != index:
                self._instead[index] = at
            return at, image
        raise MsmdiffError(f"no image of {self.source.spec} can be read: {left_out[-1]}")

    def _cropped(self, image: Image.Image, position: int) -> np.ndarray:
        size = self.config.image_size
        if self.config.crop == "random":
            return images.random_crop(image, size, numpy_stream(self.seed, "crop", position))
        return images.center_crop(image, size)

    def crop_ahead(self, positions: range) -> None:
        """Fill the cache, where there is one, with the images at these positions. Raises
        Unreadable.
        """
        wanted = np.unique(images_at(self.seed, len(self.source), positions))
        for start in range(0, len(wanted) if self._cache is not None else 0, 64):
            self._pixels(wanted[start : start + 64], [], [])

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
        found = [self._readable(int(i), [])[1] for i in indices]
        pixels = np.stack([images.center_crop(image, self.config.image_size) for image in found])
        return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def center_crops(source: Source, indices: Iterable[int], size: int) -> Tensor:
    """The images of a source at `indices`, resized and cropped as ADM does: uint8 [B, 3, size,
    size]. Raises Unreadable.
    """
    pixels = np.stack([images.center_crop(source.image(int(i)), size) for i in indices])
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def default_workers() -> int:
    """As many decoding processes as help."""
    return max(1, min(8, (os.cpu_count() or 2) - 1))


def batches(
    dataset: TrainingImages,
    chunks: Chunks,
    pin_memory: bool,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Batch]:
    """The endless stream of a process's batches; `note` is told of each image that is left out."""
    workers = dataset.config.workers
    if workers is None:
        workers = 0 if dataset.cached else default_workers()
    told = set()
    for batch in through_workers(dataset, chunks, workers, pin_memory=pin_memory):
        for sentence in batch.left_out:
            if sentence not in told:
                told.add(sentence)
                note(f"left out: {sentence}")
        yield batch


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # as was asked
        made = DataLoader(
            dataset,
            batch_sampler=chunks,
            collate_fn=_as_is,
            worker_init_fn=_leave_signals_to_the_parent,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            timeout=min(LOOK_EVERY, PATIENCE) if workers else 0,
            pin_memory=pin_memory,
        )
        loader = iter(made)
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
