"""What can be measured: images on disk, samples drawn from weights on the fly, and statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msmdiff.core import files, weights
from msmdiff.core.config import section
from msmdiff.core.data import images, sources
from msmdiff.core.data.loader import default_workers, through_workers
from msmdiff.core.data.source import Source
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import statistics
from msmdiff.core.metrics.statistics import Statistics
from msmdiff.core.model import Model
from msmdiff.core.sections import DataConfig

UNREADABLE_SHARE = 0.01
"""Up to this share of a set's images may be unreadable; they are left out, named and counted."""


class Images:
    """A set of images, or its statistics alone.

    Attributes:
        spec, notes: what the user wrote, and how the images were sampled.
        stored, settings: statistics on disk, and what those of the images must share with others.
        bad: unreadable images by index, with the reason, as far as they were met.
    """

    stored: Statistics | None = None

    def __init__(self, spec: str, **notes: Any) -> None:
        self.spec, self.notes = spec, notes
        self.bad: dict[int, str] = {}
        self.settings: dict[str, str] = {}

    def __len__(self) -> int:
        return 0

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        """The images at `indices`, in order, without unreadable ones: uint8 [B, 3, H, W]."""
        return iter(())

    def unreadable(self) -> list[str]:
        """Names and reasons; raises MsmdiffError when they are too large a share."""
        return []


class Stored(Images):
    """A source's images, decoded in worker processes; centre-cropped by ADM's rule, as in training,
    where asked.

    Raises UsageError for fewer than two images, and MsmdiffError for several sizes or too many
    unreadable ones.
    """

    def __init__(self, source: Source, crop: int | None = None, workers: int | None = None) -> None:
        super().__init__(source.spec)
        self.source, self.crop, self._size = source, crop, ""
        alpha = (
            source.decoding.alpha if crop else "drop"
        )  # cropped as in training, laid on as there
        source.decoding = replace(source.decoding, alpha=alpha)
        if len(source) < 2:
            raise UsageError(
                f"{source.spec} holds {len(source)} image: a distance needs at least two "
                "on each side"
            )
        fast = len(source) < 64 or source.verified
        if workers is None:
            workers = 0 if fast else default_workers()
        self._workers = workers
        # The first that can be read: an unreadable image says nothing of the size.
        first = next(self.batches(range(len(source)), 1))
        self._size = f"{first.shape[3]}x{first.shape[2]}"
        self.settings = {"image_size": self._size, "alpha": source.decoding.alpha}
        if crop:
            self.settings["crop"] = f"adm {crop}"

    def __len__(self) -> int:
        return len(self.source)

    def _pixels(self, index: int) -> np.ndarray | str:
        try:
            image = self.source.image(index)
        except MsmdiffError as error:
            return files.reason(error)
        return np.asarray(image) if self.crop is None else images.center_crop(image, self.crop)

    def __getitems__(
        self, indices: list[int]
    ) -> tuple[np.ndarray | None, dict[int, str]] | MsmdiffError:
        """A batch and what of it could not be read; an error as a value, since a worker would send
        a traceback.
        """
        good: list[np.ndarray] = []
        bad: dict[int, str] = {}
        for index in indices:
            pixels = self._pixels(index)
            if isinstance(pixels, str):
                bad[index] = pixels
                continue
            size = f"{pixels.shape[1]}x{pixels.shape[0]}"
            if self._size and size != self._size:  # not known while the first is looked for
                return MsmdiffError(
                    f"{self.spec} mixes sizes: {self._name(index)} is {size}, the first is "
                    f"{self._size}; resize them to one size, or crop both sets with --crop"
                )
            good.append(pixels)
        if not good:
            return None, bad
        batch = np.stack(good).transpose(0, 3, 1, 2)  # [B, 3, H, W]
        return batch.copy(), bad

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        chunks = [list(indices[i : i + batch_size]) for i in range(0, len(indices), batch_size)]
        workers = self._workers if self._size else 0  # none to find the first image
        for batch, bad in through_workers(self, chunks, workers):
            self.bad |= bad
            self.unreadable()  # stops as soon as they are too many
            if batch is not None:
                yield torch.from_numpy(batch)

    def _name(self, index: int) -> str:
        return self.source.name(index)

    def unreadable(self) -> list[str]:
        named = [f"{self._name(i)} ({reason})" for i, reason in self.bad.items()]
        if len(named) > UNREADABLE_SHARE * len(self):
            every = sources.survey(self.source)[0]
            raise MsmdiffError(
                f"{len(every)} of {len(self)} images in {self.spec} cannot be read, more than "
                f"{UNREADABLE_SHARE:.0%}, the first is {named[0]}: repair or remove them"
            )
        return named


class Drawn(Images):
    """Images sampled from a model, seeds 0 to n - 1; none is written to disk. Classes come in the
    data's proportions, where the weights know them, else in turn.
    """

    def __init__(self, spec: str, model: Model, n: int, **notes: Any) -> None:
        super().__init__(spec, n=n, sample=model.config.sample.model_dump(mode="json"), **notes)
        self.model = model
        side = model.config.data.image_size
        self.settings = {"image_size": f"{side}x{side}"}

    def __len__(self) -> int:
        return self.notes["n"]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        counts = getattr(self.model.condition, "counts", ())
        y = self.model.condition.deal("data" if sum(counts) else None, indices)
        for batch in self.model.batches(indices, y, batch_size=batch_size):
            yield batch.images


def draws(spec: str) -> bool:
    """Whether images are sampled for `spec`: weights, the directory of a run or a checkpoint, or a
    run's name, unless data has it: `digits`.
    """
    path = Path(spec)
    run = [*path.glob("run.json"), *path.glob("state.pt"), *path.glob("nnet*.pth")] or (
        (Path("runs") / spec).is_dir() and not sources.is_data(spec)
    )
    return bool(run) or path.suffix in (".safetensors", ".pt", ".pth")


def _for_drawing(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer without the network's fields and the options of sources."""
    kept = {name: content for name, content in layer.items() if name != "model"}
    if "data" in kept:
        known = DataConfig.model_fields
        kept["data"] = {key: value for key, value in kept["data"].items() if key in known}
    return kept


def open_input(
    spec: str,
    *,
    n: int = 10_000,
    crop: int | None = None,
    workers: int | None = None,
    layers: Sequence[dict[str, Any]] = (),
    device: torch.device | str = "cpu",
    data: DataConfig | None = None,
) -> Images:
    """A folder, zip, `.npz` of images or `digits`; an `.npz` of statistics (ADM's may hold both);
    or weights.

    Where `draws` says so, `n` images are drawn, with the configuration `layers` over the stored
    one. Of the `layers`, images on disk take `data.float_range` and their source's options; where
    `data` is given, they are opened by it.
    """
    path = Path(spec)
    found = statistics.load(path) if path.suffix.lower() == ".npz" and path.is_file() else None
    if found is not None and not sources.holds_images(path):
        opened = Images(spec)
    elif draws(spec):
        fields = {name: value for layer in layers for name, value in layer.get("model", {}).items()}
        others = [_for_drawing(layer) for layer in layers]
        loaded = weights.load(spec, device, others, **fields)
        sha256 = files.checksum(weights.file_of(loaded.path))
        opened = Drawn(spec, loaded, n, weights=str(loaded.path), sha256=sha256)
    elif data is not None:
        opened = Stored(sources.open_configured(data), crop, workers)
    else:
        given = {key: value for layer in layers for key, value in layer.get("data", {}).items()}
        options = {key: value for key, value in given.items() if sources.takes(spec, key)}
        source = sources.open_source(spec, "none", options=options)
        told = {key: given[key] for key in ("float_range", "background") if key in given}
        ground = section("data", **told)
        source.decoding = images.Decoding(ground.float_range, ground.background)
        opened = Stored(source, crop, workers)
    opened.stored = found
    return opened
