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
from typing import Any

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
    cache = source if isinstance(source, Cache) else None
    if isinstance(source, Latents) and (mirror or cache is None):
        raise UsageError(
            f"{source.spec} is encoded already"
            + (": it cannot be mirrored any more" if mirror else "")
        )
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if cache is not None:  # encoded already: no codec has a part in it
        about, captions = cache.codec, Captions.of_cache(cache) if cache.text else None
    else:
        about = codec.identity()
    reader = TrainingImages(source, data, seed=0)

    def load(chosen: range) -> tuple[Tensor, Tensor | None]:
        if cache is not None:
            return cache.gather(np.asarray(chosen))
        return reader.crops(chosen), None if source.labels is None else torch.from_numpy(
            source.labels[list(chosen)]
        )

    def pack(images: Tensor) -> Tensor:
        if cache is not None:
            return images
        images = images.to(device)
        packed = codec.pack(images)
        return torch.stack([packed, codec.pack(images.flip(-1))], dim=1) if mirror else packed

    count, (first, labels) = len(source), load(range(1))
    sample = pack(first)
    listing = "\n".join(source.describe(i) for i in range(count))
    digest = hashlib.sha256(listing.encode()).hexdigest()
    header: dict[str, Any] = {
        "msmdiff_packed": FORMAT_VERSION,
        "count": count,
        "shape": list(sample.shape[1:]),
    }
    header |= {
        "dtype": "uint8" if sample.dtype == torch.uint8 else dtype,
        "mirrored": mirror,
        "codec": about,
    }
    header |= {
        "image_size": data.image_size if cache is None else None,
        "labelled": labels is not None,
    }
    header |= {
        "class_names": list(source.class_names),
        "text": captions.about if captions else None,
        "shard": shard,
    }
    header |= {"source": {"spec": source.spec, "listing_sha256": digest}}
    _begin(out, header, [source.name(i) for i in range(count)], captions, rank)
    offsets, done, started = (
        np.cumsum([0, *(captions.counts if captions else [])]),
        0,
        time.perf_counter(),
    )
    todo = [s for s in range(rank, -(-count // shard), world) if s not in finished(out)]
    spans = [range(s * shard, min((s + 1) * shard, count)) for s in todo]
    total = sum(map(len, spans))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, span in zip(todo, spans, strict=True):
            chunks = [span[i : i + batch_size] for i in range(0, len(span), batch_size)]
            for chunk, (images, labels) in zip(chunks, pool.map(load, chunks), strict=True):
                _write(out / "entries.npy", chunk.start, pack(images))
                if labels is not None:
                    _write(out / "labels.npy", chunk.start, labels)
                if captions is not None:
                    _write(
                        out / "captions.npy", int(offsets[chunk.start]), captions.features(chunk)
                    )
                done += len(chunk)
                progress(done, total, {"images_per_s": done / (time.perf_counter() - started)})
            with (out / "shards.txt").open("a") as file:
                file.write(f"\n{number} done\n")  # whole, also after a line that a kill cut short
    return total


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
        elsewhere = ("source.spec", "codec.vae", "text.encoder")  # checksums stand for these
        old, new = (
            {k: v for k, v in flatten(h).items() if k not in elsewhere}
            for h in (read_header(out), header)
        )
        if changed := [
            f"{k}: {old.get(k)!r} there, {v!r} now" for k, v in new.items() if old.get(k) != v
        ]:
            raise UsageError(
                f"{out} holds another packed set ({'; '.join(changed)}): give another -o"
            )
        return
    own = {
        "entries.npy",
        "labels.npy",
        "captions.npy",
        "offsets.npy",
        "names.txt",
        ".packed.json.part",
    }
    if out.is_dir() and (others := {p.name for p in out.iterdir()} - own):
        raise UsageError(f"{out} holds other things ({min(others)}): give an empty or a new folder")
    arrays = {"entries": (header["dtype"], (header["count"], *header["shape"]))}
    if header["labelled"]:
        arrays["labels"] = ("int64", (header["count"],))
    if captions:
        arrays["captions"] = ("float16", (sum(captions.counts) + 1, *captions.null.shape))
    try:
        out.mkdir(parents=True, exist_ok=True)
        needed = sum(
            math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in arrays.values()
        )
        if needed > (free := shutil.disk_usage(out).free):
            raise MsmdiffError(
                f"{out} needs {needed / 2**30:,.1f} GiB, its disk has {free / 2**30:,.1f} GiB free"
            )
        for name, (dtype, shape) in arrays.items():
            open_memmap(out / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)
        if captions:
            np.save(out / "offsets.npy", np.cumsum([0, *captions.counts]))
            _write(out / "captions.npy", sum(captions.counts), captions.null[None])
        (out / "names.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        (out / ".packed.json.part").write_text(
            json.dumps(header, indent=1) + "\n", encoding="utf-8"
        )
        (out / ".packed.json.part").replace(place)
    except OSError as error:
        raise MsmdiffError(f"{out} cannot be written: {error.strerror or error}") from None


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
