"""Samples on disk: resumable sets of images, with ADM's `.npz` and statistics, and single pictures
to look at.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

import msmdiff
from msmdiff.core import files, weights
from msmdiff.core.condition import Text, Unconditional
from msmdiff.core.data import npy, text
from msmdiff.core.data.images import grid, labelled, read_rgb
from msmdiff.core.errors import UsageError
from msmdiff.core.gallery import pictures
from msmdiff.core.gallery.folder import RECORD, Folder, is_ours, is_whole, save
from msmdiff.core.metrics import evaluate, features, statistics
from msmdiff.core.model import Model
from msmdiff.core.samplers import editing
from msmdiff.core.samplers.times import visited
from msmdiff.core.seeding import spans
from msmdiff.core.training.previews import to_hwc

Progress = Callable[[int, int, dict[str, Any]], None]
"""(done, of how many, other figures)."""


@dataclass
class Request:
    """What to draw: a set of images in `folder`, or one picture beside it.

    Attributes:
        seeds: one image each.
        classes: `3`, `0-9`, `0,4,7`, names, or `balanced` (all, as None) are dealt to the seeds in
            turn; `random` and `data` (in the data's proportions) are by seed.
        prompts: of a network that draws from text, dealt to the seeds in turn.
        png, npz, stats, grid: what a set becomes; the statistics are of `features` with their
            `weights`.
        overwrite: replace files that this tool did not write.
        interpolate, inpaint, trajectory: two seeds `A,B`, an image and a mask, or x0 over time:
            these make a picture.
    """

    seeds: list[int]
    folder: Path
    classes: str | None = None
    prompts: Sequence[str] = ()
    batch_size: int = 64
    png: bool = True
    npz: Path | None = None
    stats: Path | None = None
    features: str = "inception"
    weights: Path | None = None
    grid: bool = True
    overwrite: bool = False
    interpolate: str | None = None
    inpaint: tuple[Path, Path] | None = None
    trajectory: bool = False

    @property
    def picture(self) -> str | None:
        """What the picture is called, or None for a set."""
        kinds = ("interpolate", "inpaint", "trajectory")
        return next((kind for kind in kinds if getattr(self, kind)), None)


class Gallery:
    """A request and the model to draw it with.

    Raises UsageError for classes or prompts that the network has no use for, or that it lacks.
    """

    def __init__(self, model: Model, request: Request) -> None:
        self.request, self.model = request, model
        options, condition, path = model.config.sample, model.condition, model.path
        self._context: Tensor | None = None
        if request.classes is not None and not condition.count:
            raise UsageError(f"--classes {request.classes}: {path} is unconditional")
        labels_guide = not model.guide and options.cfg_against != "route"
        if isinstance(condition, Unconditional) and options.cfg_scale != 1 and labels_guide:
            raise UsageError(
                f"sample.cfg_scale {options.cfg_scale:g} (--cfg): {path} is unconditional, set it "
                "to 1"
            )
        self._settings = {
            "weights": str(path),
            "sha256": files.checksum(weights.file_of(path)),
            "sample": options.model_dump(mode="json"),
            "codec": model.codec.identity() | model.config.codec.model_dump(mode="json"),
            "model": model.config.model.model_dump(mode="json"),
            "classes": request.classes,
            "msmdiff": msmdiff.__version__,
            "torch": torch.__version__,
        }
        if request.prompts or isinstance(condition, Text):
            self._context, null = text.features(model.config, request.prompts)
            if isinstance(condition, Text):
                condition.null = null
            joined = "\n".join(request.prompts).encode()
            self._settings["prompts_sha256"] = hashlib.sha256(joined).hexdigest()
        else:
            self._told(request.seeds)  # says what is wrong with the classes before anything is made
        if options.guide is not None:
            guide = weights.locate(options.guide, ema=options.guide_ema)
            self._settings["guide_sha256"] = files.checksum(weights.file_of(guide))

        self._folder = Folder(request.folder, self._settings, self._class_of, request.overwrite)

    def _told(self, seeds: Sequence[int]) -> Tensor | None:
        """What the network is told for each seed, by the seed alone."""
        if self._context is not None:
            return self._context[[seed % len(self._context) for seed in seeds]]
        return self.model.condition.deal(self.request.classes, seeds)

    def make(self, progress: Progress) -> str:
        """Draw and write; says what is where. Each of several processes takes a share, and the
        first one reports.

        Raises UsageError where the folder holds other images, and MsmdiffError for a file that
        cannot be written; images before it are whole, and are not made again.
        """
        rank, world = 0, 1
        if dist.is_initialized():
            rank, world = dist.get_rank(), dist.get_world_size()
        if self.request.picture:
            return self._picture(self.request.picture) if rank == 0 else ""
        wish = self.request
        outputs = [wish.npz, wish.stats]
        if wish.grid and (wish.png or wish.npz):
            outputs.append(self._grid_path())
        for path in outputs:
            if path and rank == 0:
                files.require_ours(path, is_ours(path), wish.overwrite)
        extractor = None
        if wish.stats:
            extractor = features.build(wish.features, wish.weights, self.model.device)
        with ExitStack() as held:
            earlier = self._folder.claim(held) if wish.png and rank == 0 else []
            raw = self._raw_array(held) if wish.npz and rank == 0 else self._raw_path()
            if world > 1:
                dist.barrier()  # the folder and the file are there
            mine = sorted(set(wish.seeds[rank::world]))
            there = [seed for seed in mine if wish.png and is_whole(self._folder.image(seed))]
            found = self._fill(mine, there, extractor, raw, _Shown(progress, rank, world))
            if world > 1:
                dist.barrier()  # all images are there
            return self._finish(earlier, there, found, raw) if rank == 0 else ""

    def _finish(
        self,
        earlier: list[int],
        there: list[int],
        found: statistics.Statistics | None,
        raw: Path | None,
    ) -> str:
        """Write what is made of all images; says what is where."""
        wish, count = self.request, len(self.request.seeds)
        shown = [f"{count} images"]
        if wish.png:
            self._folder.record([*earlier, *wish.seeds])
            already = f" ({len(there)} were there)" if there else ""
            shown = [f"{count} images in {wish.folder}/{already}"]
        canvas = npy.mapped(raw) if raw else None
        if wish.grid and (wish.png or canvas is not None):
            shown.append(f"grid in {self._grid(canvas)}")
        if canvas is not None and wish.npz:
            self._archive(wish.npz, canvas)
            shown.append(str(wish.npz))
        if wish.stats and found is not None:
            found.settings["sampled"] = json.dumps(self._record(wish.seeds))
            statistics.save(wish.stats, found)
            shown.append(f"statistics in {wish.stats}")
        return ", ".join(shown)

    def _raw_path(self) -> Path | None:
        npz = self.request.npz
        return npz.with_name(f".{npz.name}.part.npy") if npz else None

    def _raw_array(self, held: ExitStack) -> Path:
        """A plain array that all processes fill, as long as `held` is open; the archive is made of
        it at the end.
        """
        wish, side, raw = self.request, self.model.config.data.image_size, self._raw_path()
        assert wish.npz is not None
        assert raw is not None
        with files.writing(wish.npz):
            raw.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.Lock(raw, f"another process is writing {wish.npz}: wait"))
        held.callback(raw.unlink, missing_ok=True)  # before the lock is let go
        shape = (len(wish.seeds), side, side, 3)
        npy.require_room(wish.npz, 2 * math.prod(shape))  # and of the archive
        npy.create(raw, "uint8", shape)
        return raw

    def _fill(
        self,
        mine: Sequence[int],
        there: list[int],
        extractor: Any,
        raw: Path | None,
        shown: "_Shown",
    ) -> statistics.Statistics | None:
        """Draw what is not there yet, into files and the array; the statistics where wanted."""
        side = self.model.config.data.image_size
        images = self._images(mine, there, raw, shown)
        if extractor is None:
            for _ in images:
                pass
            return None
        return evaluate.of_images(images, extractor, settings={"image_size": f"{side}x{side}"})

    def _images(
        self, mine: Sequence[int], there: list[int], raw: Path | None, shown: "_Shown"
    ) -> Iterator[Tensor]:
        """All images where they are needed again, else those that were not there: uint8 [B, 3, H,
        W].

        They come in the order of `mine`, and are cut into batches whatever was there: an
        interrupted sampling ends with the same statistics, bit for bit.
        """
        wish, stored = self.request, set(there)
        place = {seed: i for i, seed in enumerate(wish.seeds)}
        todo = [seed for seed in mine if seed not in stored]
        drawn = self._drawn_anew(todo, len(mine), shown)
        wanted = mine if wish.npz or wish.stats else todo
        for start in range(0, len(wanted), wish.batch_size):
            seeds = wanted[start : start + wish.batch_size]
            rows = [self._stored(seed) if seed in stored else next(drawn) for seed in seeds]
            pixels = np.stack(rows)
            if raw is not None:
                npy.write_rows(raw, [place[seed] for seed in seeds], pixels)
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _drawn_anew(
        self, seeds: Sequence[int], total: int, shown: "_Shown"
    ) -> Iterator[np.ndarray]:
        """The images of some seeds in their order, each uint8 [H, W, 3], and written where PNGs are
        wanted; `total` counts those that were there, too.
        """
        done, began = 0, monotonic()
        size, there = self.request.batch_size, total - len(seeds)
        steps = len(visited(self.model.process.schedule, self.model.config.sample)) - 1
        watch = editing.counting(lambda step: shown.tell_step(there + done, total, step, steps))
        told = self._told(seeds)
        for drawn in self.model.batches(seeds, told, batch_size=size, wraps=[watch]):
            pixels = np.ascontiguousarray(to_hwc(drawn.images))
            if self.request.png:
                for seed, image in zip(drawn.seeds, pixels, strict=True):
                    save(Image.fromarray(image), self._folder.image(seed))
            done += len(pixels)
            shown.tell(there + done, total, done / (monotonic() - began))
            yield from pixels

    def _stored(self, seed: int) -> np.ndarray:
        return np.asarray(read_rgb(self._folder.image(seed)))

    def _grid(self, canvas: np.ndarray | None) -> Path:
        """The first 100 images in one picture, one class a column where there are few."""
        wish = self.request
        seeds = wish.seeds[:100]
        if canvas is not None:
            first = np.asarray(canvas[:100])
        else:
            first = np.stack([self._stored(seed) for seed in seeds])
        labels = self.model.condition.deal(wish.classes, wish.seeds)
        different = 0 if labels is None else len(set(labels.tolist()))
        columns = different if 1 < different <= 20 else None
        picture = grid(first, columns)
        names = getattr(self.model.condition, "names", ())
        if columns is not None and labels is not None and len(names) > max(labels.tolist()):
            heads = [names[label] for label in labels[:columns].tolist()]
            picture = labelled(picture, columns=heads if len(set(heads)) == columns else ())
        return save(picture, self._grid_path(), self._record(seeds))

    def _grid_path(self) -> Path:
        wish = self.request
        if wish.npz is not None and not wish.png:
            return wish.npz.with_suffix(".grid.png")
        return self._beside("grid")

    def _archive(self, npz: Path, canvas: np.ndarray) -> None:
        """ADM's file: the images, and their classes where there are any."""
        known: dict[str, Any] = {}
        labels = self.model.condition.deal(self.request.classes, self.request.seeds)
        if labels is not None:
            known["arr_1"] = labels.numpy()
        known[RECORD] = np.array(json.dumps(self._record(self.request.seeds)))
        with files.atomic(npz) as part, part.open("wb") as file:
            np.savez(file, arr_0=canvas, **known)

    def _class_of(self, seed: int) -> str:
        """What a seed's class is called; numbers are no names."""
        names = list(getattr(self.model.condition, "names", ()))
        told = self.model.condition.deal(self.request.classes, [seed])
        if told is None or names == [str(number) for number in range(len(names))]:
            return ""
        number = int(told[0])
        return names[number] if number < len(names) else ""

    # ------------------------------------------------------------------ single pictures

    def _picture(self, kind: str) -> str:
        """An interpolation, fillings of an image, or predictions over time."""
        target = self._beside(kind)
        files.require_ours(target, is_ours(target), self.request.overwrite)
        images, columns = pictures.KINDS[kind](self.model, self.request, self._drawn)
        save(grid(to_hwc(images), columns), target, self._record(self.request.seeds))
        return f"picture in {target}"

    def _drawn(self, seeds: list[int], **how: Any) -> Tensor:
        """The images of some seeds, in one batch."""
        told = self._told(seeds)
        drawn = self.model.batches(seeds, told, batch_size=len(seeds), **how)
        return torch.cat([batch.images for batch in drawn])

    # ------------------------------------------------------------------ what is on disk

    def _beside(self, kind: str) -> Path:
        folder = files.named(self.request.folder)
        return folder.with_name(f"{folder.name}.{kind}.png")

    def _record(self, seeds: Iterable[int]) -> dict[str, Any]:
        """What images were made with, as it is stored with them."""
        return {**self._settings, "seeds": spans(seeds)}


@dataclass
class _Shown:
    """Progress, as the first process tells it for all."""

    progress: Progress
    rank: int
    world: int

    def tell(self, done: int, total: int, images_per_s: float) -> None:
        if self.rank == 0:
            left = (total - done) / images_per_s
            about = {"images_per_s": images_per_s * self.world, "seconds_left": left}
            self.progress(done, total, about)

    def tell_step(self, done: int, total: int, step: int, steps: int) -> None:
        """Inside a batch, which may take long."""
        if self.rank == 0 and done < total:
            self.progress(done, total, {"step": f"{step} of {max(step, steps)}"})
