"""Writing a packed set (see `latents`): once, offline, on one or several processes, and again from
where it stopped.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from msmdiff.core.config import flatten
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
    names = [source.name(i) for i in range(count)]
    _begin(out, header, names, captions=captions, rank=rank)
    starts = np.cumsum([0, *(captions.counts if captions else [])])
    todo = [s for s in range(rank, -(-count // shard), world) if s not in finished(out)]
    spans = [range(s * shard, min((s + 1) * shard, count)) for s in todo]
    done, total, started = 0, sum(map(len, spans)), time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, span in zip(todo, spans, strict=True):
            chunks = [span[i : i + batch_size] for i in range(0, len(span), batch_size)]
            for chunk, (images, labels) in zip(chunks, pool.map(reader.load, chunks), strict=True):
                _write(out / "entries.npy", chunk.start, reader.pack(images))
                if labels is not None:
                    _write(out / "labels.npy", chunk.start, labels)
                if captions is not None:
                    _write(out / "captions.npy", int(starts[chunk.start]), captions.features(chunk))
                done += len(chunk)
                progress(done, total, {"images_per_s": done / (time.perf_counter() - started)})
            with (out / "shards.txt").open("a") as file:
                file.write(f"\n{number} done\n")  # whole, also after a line that a kill cut short
    return total


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
    digest = hashlib.sha256(listing.encode()).hexdigest()
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
    """The first process makes the set's files, `packed.json` last; everyone checks that `out` is
    this set.
    """
    place, deadline = out / "packed.json", time.monotonic() + 600
    while rank and not place.is_file():
        if time.monotonic() > deadline:
            raise MsmdiffError(f"{place} was not made by the first process within ten minutes")
        time.sleep(0.1)
    if place.is_file():
        _check_same(out, header)
        return
    made = ("entries.npy", "labels.npy", "captions.npy", "offsets.npy", "names.txt")
    own = {*made, ".packed.json.part"}
    if out.is_dir() and (others := {p.name for p in out.iterdir()} - own):
        raise UsageError(f"{out} holds other things ({min(others)}): give an empty or a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        _make_arrays(out, header, captions)
        (out / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        part = out / ".packed.json.part"
        part.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        part.replace(place)
    except OSError as error:
        raise MsmdiffError(f"{out} cannot be written: {error.strerror or error}") from None


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
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in arrays.values()]
    free = shutil.disk_usage(out).free
    if sum(sizes) > free:
        raise MsmdiffError(
            f"{out} needs {sum(sizes) / 2**30:,.1f} GiB, its disk has {free / 2**30:,.1f} GiB free"
        )
    for name, (dtype, shape) in arrays.items():
        open_memmap(out / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
    if captions:
        np.save(out / "offsets.npy", np.cumsum([0, *captions.counts]))
        _write(out / "captions.npy", sum(captions.counts), captions.null[None])


def _write(path: Path, row: int, values: Tensor) -> None:
    """Rows of a `.npy` file from `row` on, by plain writes: through a memory map a full disk would
    kill the process.
    """
    target = np.load(path, mmap_mode="r")
    try:
        with path.open("r+b") as file:
            file.seek(target.offset + row * target.strides[0])
            file.write(np.ascontiguousarray(values.cpu().numpy().astype(target.dtype)).data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MsmdiffError(
            f"{path} cannot be written: {error.strerror or error}; finished shards are kept"
        ) from None
