"""Samples on disk: resumable sets of images, with ADM's `.npz` and statistics, and single pictures
to look at.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
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
from msmdiff.core.build import context_shape
from msmdiff.core.config import flatten
from msmdiff.core.data import text
from msmdiff.core.data.images import UNREADABLE, center_crop, grid, read_rgb
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import evaluate, features, statistics
from msmdiff.core.samplers import editing
from msmdiff.core.samplers.generate import generate
from msmdiff.core.seeding import SeedNoise, numpy_stream, stream
from msmdiff.core.training.previews import to_hwc


@dataclass
class Request:
    """What to draw: a set of images in `folder`, or one picture beside it.

    Attributes:
        seeds: one image each.
        classes: `3`, `0-9`, `0,4,7`, or `balanced` (all, as None) are dealt to the seeds in turn;
            `random` is by seed.
        prompts: of a network that draws from text, dealt to the seeds in turn.
        png, npz, stats, grid: what a set becomes; the statistics are of `features` with their
            `weights`.
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
    interpolate: str | None = None
    inpaint: tuple[Path, Path] | None = None
    trajectory: bool = False

    @property
    def picture(self) -> str | None:
        """What the picture is called, or None for a set."""
        kinds = ("interpolate", "inpaint", "trajectory")
        return next((kind for kind in kinds if getattr(self, kind)), None)


class Gallery:
    """A request and the weights to draw it with.

    Raises UsageError for classes or prompts that the network has no use for, or that it lacks.
    """

    def __init__(self, loaded: weights.Loaded, request: Request, device: torch.device) -> None:
        self.request, self._loaded, self._device, path = request, loaded, device, loaded.path
        options, network, null = loaded.config.sample, loaded.backbone, None
        self._label: Callable[[list[int]], Any] = partial(
            deal, request.classes, network.num_classes
        )
        if request.classes is not None and not network.num_classes:
            raise UsageError(f"--classes {request.classes}: {path} is unconditional")
        labels = self._label(request.seeds) or []
        if max(labels, default=0) >= network.num_classes > 0:
            raise UsageError(
                f"--classes {request.classes}: the classes of {path} are 0 to "
                f"{network.num_classes - 1}"
            )
        wanted = context_shape(loaded.config)
        if options.cfg_scale != 1 and not (network.num_classes or wanted or loaded.guide):
            raise UsageError(
                f"sample.cfg_scale {options.cfg_scale:g} (--cfg): {path} is "
                "unconditional, set it to 1"
            )
        self._settings = {
            "weights": str(path),
            "sha256": files.checksum(weights.file_of(path)),
            "sample": options.model_dump(mode="json"),
            "classes": request.classes,
            "msmdiff": msmdiff.__version__,
            "torch": torch.__version__,
        }
        if request.prompts or wanted:
            context, null = text.features(loaded.config, request.prompts)
            self._label = lambda seeds: context[[seed % len(context) for seed in seeds]]
            self._settings["prompts_sha256"] = hashlib.sha256(
                "\n".join(request.prompts).encode()
            ).hexdigest()
        if options.guide is not None:
            guide = weights.locate(options.guide, ema=options.guide_ema)
            self._settings["guide_sha256"] = files.checksum(weights.file_of(guide))
        self._draw = partial(
            generate, network, loaded.process, loaded.codec, options,
            num_classes=network.num_classes, null=null, guide=loaded.guide, device=device,
        )  # fmt: skip

    def make(self, progress: Callable[[int, int, dict[str, Any]], None]) -> str:
        """Draw and write; says what is where. Each of several processes takes a share, and the
        first one reports.

        Raises UsageError where the folder holds other images, and MsmdiffError for a file that
        cannot be written; images before it are whole, and are not made again.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.request.picture:
            return self._picture(self.request.picture) if rank == 0 else ""
        wish, seeds, side = self.request, self.request.seeds, self._loaded.config.data.image_size
        for path in (wish.npz, wish.stats):
            if path and rank == 0:
                self._refuse_foreign(path)
                self._record(
                    path.with_suffix(".json"), seeds
                )  # first, so that a rerun knows its own
        earlier = self._claim() if wish.png and rank == 0 else []
        # A plain array first, which all processes fill; the archive is made of it at the end.
        raw = wish.npz and wish.npz.with_name(f".{wish.npz.name}.part.npy")
        if raw and rank == 0:
            raw.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(
                raw, mode="w+", dtype=np.uint8, shape=(len(seeds), side, side, 3)
            ).flush()
        if world > 1:
            dist.barrier()  # the folder and the file are there
        canvas = np.lib.format.open_memmap(raw, mode="r+") if raw else None
        row = {seed: i for i, seed in enumerate(seeds)}
        mine = seeds[rank::world]
        there = [seed for seed in mine if wish.png and _is_whole(self._png(seed))]
        todo, began = sorted(set(mine) - set(there)), monotonic()

        def take(batch: list[int], pixels: np.ndarray) -> Tensor:
            if canvas is not None:
                canvas[[row[seed] for seed in batch]] = pixels
            return torch.from_numpy(pixels).permute(0, 3, 1, 2)

        def batches() -> Iterator[Tensor]:
            """Those on disk where they are needed again, then those still to be drawn."""
            again = there if wish.npz or wish.stats else []
            for start in range(0, len(again), wish.batch_size):
                batch = again[start : start + wish.batch_size]
                yield take(
                    batch, np.stack([np.asarray(read_rgb(self._png(seed))) for seed in batch])
                )
            done = len(there)
            for images in self._draw(todo, self._label(todo), batch_size=wish.batch_size):
                pixels = np.ascontiguousarray(to_hwc(images.images))
                for seed, image in zip(images.seeds, pixels, strict=True) if wish.png else ():
                    _save(Image.fromarray(image), self._png(seed))
                yield take(images.seeds, pixels)
                done += len(pixels)
                if rank == 0:
                    speed = (done - len(there)) / (monotonic() - began)
                    about = {
                        "images_per_s": speed * world,
                        "seconds_left": (len(mine) - done) / speed,
                    }
                    progress(done, len(mine), about)

        if wish.stats:
            extractor = features.build(wish.features, wish.weights, self._device)
            found = evaluate.of_images(
                batches(), extractor, settings={"image_size": f"{side}x{side}"}
            )
        else:
            for _ in batches():
                pass
        if world > 1:
            dist.barrier()  # all images are there
        if rank:
            return ""
        shown = [f"{len(seeds)} images"]
        if wish.png:
            self._record(wish.folder / "sample.json", [*earlier, *seeds])
            shown = [
                f"{len(seeds)} images in {wish.folder}/"
                + (f" ({len(there)} were there)" if there else "")
            ]
        labels = None if wish.prompts else self._label(seeds)
        if wish.grid and (wish.png or canvas is not None):
            first = (
                canvas[:100]
                if canvas is not None
                else [np.asarray(read_rgb(self._png(s))) for s in seeds[:100]]
            )
            different = len(set(labels or ()))
            columns = different if 1 < different <= 20 else None
            beside = (
                self._beside("grid")
                if wish.png or not wish.npz
                else wish.npz.with_suffix(".grid.png")
            )
            shown.append(f"grid in {_save(grid(np.asarray(first), columns), beside)}")
        if canvas is not None and raw and wish.npz:
            known: dict[str, Any] = {} if labels is None else {"arr_1": np.array(labels, np.int64)}
            with files.whole(wish.npz) as part, part.open("wb") as file:
                np.savez(file, arr_0=canvas, **known)
            raw.unlink()
            shown.append(str(wish.npz))
        if wish.stats:
            statistics.save(wish.stats, found)
            shown.append(f"statistics in {wish.stats}")
        return ", ".join(shown)

    def _png(self, seed: int) -> Path:
        return self.request.folder / f"{seed:06d}.png"

    def _picture(self, kind: str) -> str:
        """An interpolation, fillings of an image, or predictions over time."""
        wish, loaded, seeds = self.request, self._loaded, self.request.seeds
        codec, start, wraps, rows, target = loaded.codec, None, [], [], self._beside(kind)
        self._refuse_foreign(target)
        if wish.interpolate:
            ends = parse_range(wish.interpolate, "--interpolate")
            if len(ends) != 2 or len(seeds) < 2:
                raise UsageError(
                    f"--interpolate {wish.interpolate}: give two seeds A,B, and at least 2 "
                    "images (--n)"
                )
            a, b = SeedNoise(ends, codec.shape, "cpu")()
            start, seeds = editing.slerp(a, b, len(seeds)), ends[:1] * len(seeds)
        if wish.inpaint:
            known, mask = _cropped_alike(*wish.inpaint, loaded.config.data.image_size)
            keep = mask.float().mean(1, keepdim=True) < 128
            if keep.all():
                raise UsageError(
                    f"--inpaint {wish.inpaint[1]} is black: paint white what is to be filled in"
                )
            x0 = codec.encode(known.to(self._device), stream(self._device, 0, "inpaint"))
            place = editing.wholly_kept(keep.to(self._device), codec.shape[1])
            wraps.append(editing.inpainting(loaded.process, x0, place))
            rows = [torch.where(keep, known, 128)]
        watch = editing.Trajectory()
        if wish.trajectory:
            seeds = seeds[:8]
            wraps.append(watch.wrap)
        drawn = self._draw(
            seeds, self._label(seeds), start=start, wraps=wraps, batch_size=len(seeds)
        )
        made = torch.cat([batch.images for batch in drawn])
        rows.append(torch.where(keep, known, made) if wish.inpaint else made)
        columns = min(sum(map(len, rows)), 12)
        if wish.trajectory:
            over_time = [
                codec.decode(x0, loaded.config.sample.rounding).cpu() for x0 in watch.pick(10)
            ]
            rows = [torch.stack([*over_time, rows[-1]], dim=1).flatten(0, 1)]
            columns = len(over_time) + 1
        _save(grid(to_hwc(torch.cat(rows)), columns), target)
        self._record(target.with_suffix(".json"), wish.seeds)
        return f"picture in {target}"

    def _beside(self, kind: str) -> Path:
        return self.request.folder.with_name(f"{self.request.folder.name}.{kind}.png")

    def _refuse_foreign(self, path: Path) -> None:
        """A file that was sampled has its settings beside it; others are not replaced."""
        if path.exists() and not path.with_suffix(".json").exists():
            raise UsageError(
                f"{path} is there already and was not sampled here: give another name, or remove it"
            )

    def _record(self, path: Path, seeds: Iterable[int]) -> None:
        files.write_json(path, {**self._settings, "seeds": spans(seeds)})

    def _claim(self) -> list[int]:
        """Make the folder, or check that what it holds was sampled with the same settings: sets
        must not mix.

        The settings are written before the first image. Returns the seeds of an earlier, finished
        sampling.
        """
        out, settings = self.request.folder, self._settings
        try:
            stored = json.loads((out / "sample.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            if out.is_dir() and any(p.suffix == ".png" for p in out.iterdir()):
                raise UsageError(
                    f"{out} holds images that were not sampled here: give another --out"
                ) from None
            if self.request.grid and self._beside("grid").exists():
                raise UsageError(
                    f"{self._beside('grid')} is there without its images: give another --out"
                ) from None
            self._record(out / "sample.json", [])
            return []
        except (OSError, ValueError) as error:
            raise MsmdiffError(f"{out / 'sample.json'} cannot be read: {error}") from None
        if any(stored.get(name) != value for name, value in settings.items()):
            old, new = flatten(stored), flatten(settings)
            changed = [
                f"{k}: {old.get(k)!r} there, {value!r} now"
                for k, value in new.items()
                if old.get(k) != value
            ]
            raise UsageError(
                f"{out} holds images sampled with other settings ({'; '.join(changed)}): give "
                "another --out"
            )
        for part in out.glob(".*.part"):
            part.unlink()  # of a process that was killed while writing
        return parse_range(stored["seeds"], "seeds") if stored.get("seeds") else []


def deal(classes: str | None, num_classes: int, seeds: Sequence[int]) -> list[int] | None:
    """A class per seed, by the seed alone; None where there are none."""
    if not num_classes:
        return None
    if classes == "random":
        return [int(numpy_stream(seed, "class").integers(num_classes)) for seed in seeds]
    dealt = (
        list(range(num_classes))
        if classes in (None, "balanced")
        else parse_range(str(classes), "--classes")
    )
    return [dealt[seed % len(dealt)] for seed in seeds]


def parse_range(text: str, option: str) -> list[int]:
    """`7`, `0-9`, `0,4,7` or a mixture -> integers. Raises UsageError naming the option."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span:
                raise ValueError
            numbers.extend(span)
    except ValueError:
        problem = "write a number, a rising range such as 0-9, or a list such as 0,4,7"
        raise UsageError(f"{option} {text}: {problem}") from None
    return numbers


def spans(seeds: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7": what `parse_range` reads."""
    runs = groupby(enumerate(sorted(set(seeds))), lambda place: place[1] - place[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(members) for _, members in runs)]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)


def _cropped_alike(image: Path, mask: Path, side: int) -> list[Tensor]:
    """Two images of one size, each uint8 [1, 3, side, side]."""
    opened = []
    for path in (image, mask):
        try:
            opened.append(read_rgb(path))
        except UNREADABLE as error:
            raise UsageError(f"--inpaint {path} cannot be read as an image: {error}") from None
    (width, height), masked = (picture.size for picture in opened)
    if masked != (width, height):
        raise UsageError(
            f"--inpaint {mask} is {masked[0]}x{masked[1]}, and must be {width}x{height} "
            f"like {image}"
        )
    return [
        torch.from_numpy(center_crop(each, side).copy()).permute(2, 0, 1)[None] for each in opened
    ]


def _is_whole(path: Path) -> bool:
    """Whether a PNG is there down to its end mark."""
    try:
        return path.read_bytes().endswith(b"IEND\xaeB`\x82")
    except OSError:
        return False


def _save(picture: Image.Image, path: Path) -> Path:
    with files.whole(path) as part:
        picture.save(part, format="PNG")
    return path
