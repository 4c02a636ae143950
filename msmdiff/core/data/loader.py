"""From a source to batches on the host: checking, decoding, cropping, caching, worker processes."""

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msmdiff.core.config import DataConfig
from msmdiff.core.data import images, sources
from msmdiff.core.data.order import Chunks, image_at
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.seeding import numpy_stream

CACHE_BYTES = 512 * 2**20
"""Centre-cropped data sets up to this size are kept decoded in memory, and then need no worker processes."""


@dataclass
class Batch:
    """`position` is the first place in the training sequence; images uint8 [B, 3, H, W]; labels int64 [B] or None."""

    position: int
    images: Tensor
    labels: Tensor | None

    def pin_memory(self) -> "Batch":
        labels = self.labels.pin_memory() if self.labels is not None else None
        return Batch(self.position, self.images.pin_memory(), labels)


class TrainingImages(Dataset):
    """Images by position in the training sequence, resized and cropped as ADM does.

    Args:
        source: the images.
        config: the `data` section.
        seed: of the order and of the random crops.
    """

    def __init__(self, source: sources.Source, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed
        size = config.image_size
        bytes_needed = len(source) * 3 * size**2
        self.cached = config.crop == "center" and bytes_needed <= CACHE_BYTES and not config.workers
        self._cache = np.empty((len(source), size, size, 3), np.uint8) if self.cached else None
        self._filled = np.zeros(len(source), bool)

    def __getitems__(self, positions: list[int]) -> "Batch | MsmdiffError":
        """The batch at these positions; an error as a value, since one raised in a worker arrives as a traceback."""
        try:
            return self._batch(positions)
        except MsmdiffError as error:
            return error

    def _batch(self, positions: list[int]) -> Batch:
        indices = [image_at(self.seed, len(self.source), p) for p in positions]
        pixels = np.stack([self._image(i, p) for i, p in zip(indices, positions, strict=True)])
        labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[indices])
        return Batch(positions[0], torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), labels)

    def _image(self, index: int, position: int) -> np.ndarray:
        if self._filled[index]:
            assert self._cache is not None
            return self._cache[index]
        image = self._read(index)
        if self.config.crop == "random":
            return images.random_crop(image, self.config.image_size, numpy_stream(self.seed, "crop", position))
        pixels = images.center_crop(image, self.config.image_size)
        if self._cache is not None:
            self._cache[index] = pixels
            self._filled[index] = True
        return pixels

    def _read(self, index: int) -> Image.Image:
        try:
            return self.source.read(index)
        except images.UNREADABLE as error:
            name = self.source.describe(index).split(" (")[0]
            raise MsmdiffError(f"{name} in {self.source.spec} cannot be read: {error}") from None

    def sample(self, count: int, purpose: str = "measure") -> Iterator[Tensor]:
        """Up to `count` distinct images in batches of 64, chosen by the seed: uint8 [B, 3, H, W]."""
        order = numpy_stream(self.seed, purpose).permutation(len(self.source))[:count]
        for start in range(0, len(order), 64):
            crops = [images.center_crop(self._read(int(i)), self.config.image_size) for i in order[start : start + 64]]
            yield torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy())


def _as_is(batch: Any) -> Any:
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal's group; the trainer still needs its batches to end the step.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches(dataset: TrainingImages, chunks: Chunks, pin_memory: bool) -> Iterator[Batch]:
    """The endless stream of a process's batches."""
    workers = dataset.config.workers
    if workers is None:
        workers = 0 if dataset.cached else max(1, min(8, (os.cpu_count() or 2) - 1))
    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=chunks,
            collate_fn=_as_is,
            worker_init_fn=_leave_signals_to_the_trainer,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
        )
    )
    for batch in loader:
        if isinstance(batch, MsmdiffError):
            raise batch
        yield batch


def open_training(config: DataConfig, report: Callable[[str], None]) -> sources.Source:
    """Open a data set for training and decode every image of it once, unless that was done before.

    Unreadable images stop the training by name, or are left out when `data.skip_unreadable` is set; what was left out
    is reported. The verdict is remembered per listing (names, sizes, times) in the user's cache folder.
    """
    source = sources.open_source(config.source, config.labels)
    if not config.verify or isinstance(source, sources.Digits | sources.Npz):
        return source
    listing = "\n".join(source.describe(i) for i in range(len(source)))
    remembered = cache_folder() / "verified" / f"{hashlib.sha256(listing.encode()).hexdigest()[:32]}.json"
    try:
        bad = {int(i): reason for i, reason in json.loads(remembered.read_text()).items()}
    except (OSError, ValueError):
        if len(source) > 10_000:
            report(f"checking all {len(source):,} images of {config.source} once (data.verify=false skips this)")
        bad = sources.unreadable(source)
        try:
            remembered.parent.mkdir(parents=True, exist_ok=True)
            remembered.write_text(json.dumps(bad))
        except OSError:
            pass  # a cache that cannot be written costs the next start some time, nothing else
    if not bad:
        return source
    shown = "; ".join(f"{source.describe(i).split(' (')[0]} ({reason})" for i, reason in list(bad.items())[:5])
    summary = f"{len(bad)} of {len(source)} images in {config.source} cannot be read: {shown}"
    summary += f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    if not config.skip_unreadable:
        raise MsmdiffError(f"{summary}. Repair or remove them, or leave them out with --set data.skip_unreadable=true")
    if len(bad) == len(source):
        raise MsmdiffError(summary)
    report(f"left out: {summary}")
    return sources.Subset(source, [i for i in range(len(source)) if i not in bad])


def cache_folder() -> Path:
    """Where things that can be made again are kept: MSMDIFF_CACHE, or ~/.cache/msmdiff."""
    return Path(os.environ.get("MSMDIFF_CACHE") or Path.home() / ".cache" / "msmdiff")
