"""Writing a packed set (see `latents`): once, offline, on one or several processes, and again from
where it stopped.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from msmdiff.core import files
from msmdiff.core.config import flatten
from msmdiff.core.data import npy
from msmdiff.core.data.latents import FORMAT_VERSION, Cache, Latents, finished, read_header
from msmdiff.core.data.loader import TrainingImages
from msmdiff.core.data.source import Source
from msmdiff.core.data.text import Captions
from msmdiff.core.diffusion.codecs import Codec
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import DataConfig


def encode(
    source: Source,
    codec: Codec,
    data: DataConfig,
    out: Path,
    progress: Callable[[int, int, dict[str, Any]], None],
    *,
    captions: Captions | None = None,
    mirror: bool = False,
    dtype: str = "float16",
    batch_size: int = 8,
    shard: int = 1024,
    device: torch.device | str = "cpu",
) -> int:
    """Encode images, or pack another project's `latents.Cache`, into the folder `out`; of several
    processes each takes a share. Returns how many images this process encoded now.

    Args:
        codec: packs crops of `data.image_size` (`pixel` and `dwt` alike keep them as they are).
        progress: called with this process's finished images, all of its images, and `images_per_s`.
        captions: features stored along with the images.
        mirror: also store the mirrored images.
        dtype: of moments: float16 or float32.
        batch_size, shard: images per network pass, and images that are written and resumed as one.

    Raises UsageError when `out` holds something else, and MsmdiffError for unreadable images or a
    full disk; finished shards are kept.
    """
    if isinstance(source, Latents) and (mirror or not isinstance(source, Cache)):
        why = ": it cannot be mirrored any more" if mirror else ""
        raise UsageError(f"{source.spec} is encoded already{why}")
    reader: _Reader
    if isinstance(source, Cache):
        reader = _CacheReader(source)
        captions = Captions.of_cache(source) if source.text else None
    else:
        reader = _ImageReader(source, codec, data, mirror=mirror, device=device)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    header = _header(source, reader, captions, dtype) | {"mirrored": mirror, "shard": shard}
    count = len(source)
    with _sole_launch(out, rank):
        _begin(out, header, [source.name(i) for i in range(count)], captions=captions, rank=rank)
        todo = [s for s in range(rank, -(-count // shard), world) if s not in finished(out)]
        spans = {s: range(s * shard, min((s + 1) * shard, count)) for s in todo}
        writer = _Writer(out, source, captions, header["dtype"])
        _fill(spans, reader, writer, batch_size, progress)
    return sum(map(len, spans.values()))


def _fill(
    spans: dict[int, range],
    reader: "_Reader",
    writer: "_Writer",
    batch_size: int,
    progress: Callable[[int, int, dict[str, Any]], None],
) -> None:
    """Encode shards, given by their numbers and their images."""
    done, total, started = 0, sum(map(len, spans.values())), time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, span in spans.items():
            chunks = [span[i : i + batch_size] for i in range(0, len(span), batch_size)]
            for chunk, (images, labels) in zip(chunks, pool.map(reader.load, chunks), strict=True):
                writer.write(chunk, reader.pack(images), labels)
                done += len(chunk)
                progress(done, total, {"images_per_s": done / (time.perf_counter() - started)})
            writer.finish(number)


def require_free(out: Path) -> None:
    """Raise UsageError where the folder `out` holds something else than a packed set."""
    others = {p.name for p in out.iterdir()} - {".packed.json.part"} if out.is_dir() else set()
    if others and "packed.json" not in others:
        raise UsageError(f"{out} holds other things ({min(others)}): give an empty or a new folder")


@contextmanager
def _sole_launch(out: Path, rank: int) -> Iterator[None]:
    """One encoding at a time in a folder, which is made; its first process stands for the others.

    A second one would make the arrays anew under the first one's hands.
    """
    if rank:
        yield
        return
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = files.Lock(out, f"another process is encoding into {out}: wait for it")
    with lock:
        yield


@dataclass
class _Writer:
    """The files of a set."""

    out: Path
    source: Source
    captions: Captions | None
    dtype: str

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(self.captions.counts if self.captions else [])])

    def write(self, chunk: range, entries: Tensor, labels: Tensor | None) -> None:
        """Entries [B, ...], labels [B], and the captions' features, of these images."""
        self._check("latent", entries, self.dtype, list(chunk))
        self._put("entries", chunk.start, entries)
        if labels is not None:
            self._put("labels", chunk.start, labels)
        if self.captions is not None:
            counts = self.captions.counts
            features = self.captions.features(chunk)
            owners = [i for i in chunk for _ in range(counts[i])]
            self._check("caption", features, "float16", owners)
            self._put("captions", int(self._starts[chunk.start]), features)

    def finish(self, shard: int) -> None:
        """Note that all of a shard is on the disk."""
        with files.writing(self.out / "shards.txt"), (self.out / "shards.txt").open("a") as file:
            file.write(f"\n{shard} done\n")  # whole, also after a line that a kill cut short

    def _put(self, name: str, row: int, values: Tensor) -> None:
        rows = range(row, row + len(values))
        npy.write_rows(self.out / f"{name}.npy", rows, values.cpu().numpy())

    def _check(self, what: str, values: Tensor, dtype: str, owners: list[int]) -> None:
        """Raise MsmdiffError, with the image's name, for numbers that cannot be stored."""
        if dtype == "uint8":
            return
        most = np.finfo(dtype).max
        wrong = ~(values.abs() <= float(most)).flatten(1).all(dim=1)  # NaN is wrong, too
        for row in wrong.nonzero().flatten().tolist():
            finite = values[row].isfinite().all()
            problem = f"is beyond {dtype}'s {most:,.0f}" if finite else "is not finite"
            advice = "--dtype float32" if finite else "--set codec.precision=fp32, or another VAE"
            if what == "caption":
                advice = "another --text"
            raise MsmdiffError(
                f"the {what} of {self.source.name(owners[row])} {problem}: give {advice}"
            )


class _Reader(Protocol):
    """What is packed, chunk by chunk.

    `about` is what made the entries, `image_size` their images' side where that is known.
    """

    about: dict[str, Any]
    image_size: int | None

    def load(self, chosen: range) -> tuple[Tensor, Tensor | None]:
        """Images or entries [B, ...] and their labels [B] or None; called from threads."""

    def pack(self, images: Tensor) -> Tensor:
        """Images -> entries."""


class _CacheReader:
    """Another project's entries: encoded already, so that no codec has a part in them."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.about = cache, cache.codec
        self.image_size: int | None = None

    def load(self, chosen: range) -> tuple[Tensor, Tensor | None]:
        return self.cache.gather(np.asarray(chosen))

    def pack(self, images: Tensor) -> Tensor:
        return images


class _ImageReader:
    """Cropped images, and their mirror images where wanted, through a codec."""

    def __init__(
        self,
        source: Source,
        codec: Codec,
        data: DataConfig,
        *,
        mirror: bool,
        device: torch.device | str,
    ) -> None:
        self.codec, self.mirror, self.device = codec, mirror, device
        self.about = {} if isinstance(source, Latents) else codec.identity()
        self.image_size: int | None = data.image_size
        self._labels = source.labels
        self._images = TrainingImages(source, data, seed=0)

    def load(self, chosen: range) -> tuple[Tensor, Tensor | None]:
        labels = None
        if self._labels is not None:
            labels = torch.from_numpy(self._labels[list(chosen)])
        return self._images.crops(chosen), labels

    def pack(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        packed = self.codec.pack(images)
        if not self.mirror:
            return packed
        return torch.stack([packed, self.codec.pack(images.flip(-1))], dim=1)


def _header(
    source: Source, reader: _Reader, captions: Captions | None, dtype: str
) -> dict[str, Any]:
    """What packed.json says of a set, but for how it is cut."""
    first, labels = reader.load(range(1))
    sample = reader.pack(first)
    listing = "\n".join(source.describe(i) for i in range(len(source)))
    digest = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    return {
        "msmdiff_packed": FORMAT_VERSION,
        "count": len(source),
        "shape": list(sample.shape[1:]),
        "dtype": "uint8" if sample.dtype == torch.uint8 else dtype,
        "codec": reader.about,
        "image_size": reader.image_size,
        "labelled": labels is not None,
        "class_names": list(source.class_names),
        "text": captions.about if captions else None,
        "source": {"spec": source.spec, "listing_sha256": digest},
    }


def _begin(
    out: Path, header: dict[str, Any], names: list[str], captions: Captions | None, rank: int
) -> None:
    """The first process makes the set's files; everyone checks that `out` is this set.

    `packed.json` comes first, so that what a kill leaves is known as ours; `shards.txt` comes last
    and says that the other files are there.
    """
    place, made, deadline = out / "packed.json", out / "shards.txt", time.monotonic() + 600
    while rank and not made.is_file():
        if time.monotonic() > deadline:
            raise MsmdiffError(f"{made} was not made by the first process within ten minutes")
        time.sleep(0.1)
    require_free(out)
    if place.is_file():
        _check_same(out, header)
    else:
        files.write_json(place, header)
    if made.is_file():
        return
    _make_arrays(out, header, captions)
    lines = "".join(name.replace("\n", " ") + "\n" for name in names)
    with files.writing(out / "names.txt"):
        (out / "names.txt").write_bytes(lines.encode(errors="surrogateescape"))
        files.fsync(out / "names.txt")
    files.write_text(made, "")


def _check_same(out: Path, header: dict[str, Any]) -> None:
    """Raises UsageError with the differences where `out` holds another set."""
    elsewhere = ("source.spec", "codec.vae", "text.encoder")  # checksums stand for these
    old, new = flatten(read_header(out)), flatten(header)
    changed = [
        f"{key}: {old.get(key)!r} there, {value!r} now"
        for key, value in new.items()
        if key not in elsewhere and old.get(key) != value
    ]
    if changed:
        raise UsageError(f"{out} holds another packed set ({'; '.join(changed)}): give another -o")


def _make_arrays(out: Path, header: dict[str, Any], captions: Captions | None) -> None:
    """Empty files of the right sizes. Raises MsmdiffError where the disk has no room for them."""
    arrays = {"entries": (header["dtype"], (header["count"], *header["shape"]))}
    if header["labelled"]:
        arrays["labels"] = ("int64", (header["count"],))
    if captions:
        arrays["captions"] = ("float16", (sum(captions.counts) + 1, *captions.null.shape))
        arrays["offsets"] = ("int64", (header["count"] + 1,))
    for name in arrays:
        (out / f"{name}.npy").unlink(missing_ok=True)  # of a process that was killed here
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in arrays.values()]
    npy.require_room(out, sum(sizes))
    for name, (dtype, shape) in arrays.items():
        npy.create(out / f"{name}.npy", dtype, shape)
    if captions:
        starts = np.cumsum([0, *captions.counts])
        npy.write_rows(out / "offsets.npy", range(len(starts)), starts)
        npy.write_rows(out / "captions.npy", [int(starts[-1])], captions.null[None].numpy())
