"""Looking at data sets: what they hold, how fast they are read, contact sheets; and packing them
into a zip.
"""

import io
import os
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from msmdiff.core import files, registry
from msmdiff.core.config import section
from msmdiff.core.data import sources
from msmdiff.core.data.images import KNOWN, center_crop, grid
from msmdiff.core.data.latents import Latents, Packed
from msmdiff.core.data.loader import TrainingImages, batches, flip
from msmdiff.core.data.order import Chunks
from msmdiff.core.data.source import PROBES, Source
from msmdiff.core.diffusion import codecs
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.files import reason
from msmdiff.core.sections import CodecConfig, DataConfig
from msmdiff.core.seeding import numpy_stream, stream


def report(source: Source) -> dict[str, Any]:
    """What a data set holds. Images are all decoded."""
    found: dict[str, Any] = {"images": len(source)}
    if source.labels is not None:
        names = [source.class_names[label] for label in source.labels.tolist()]
        found["classes"] = dict(sorted(Counter(names).items()))
    elif source.unlabelled:
        found["classes"] = source.unlabelled
    if source.left_out:
        found["left_out"] = {"count": len(source.left_out), "names": list(source.left_out)}
    if not isinstance(source, Latents):
        bad, sizes = sources.survey(source)
        found["sizes"] = {
            f"{width}x{height}": count for (width, height), count in sizes.most_common()
        }
        if share := transparent(source):
            ground = source.decoding.alpha
            found["transparent"] = f"about {share:.0%}, laid on {ground} (data.background)"
        found["unreadable"] = [f"{source.name(i)} ({reason(e)})" for i, e in bad.items()]
        return found
    found |= {
        "entry": list(source.shape),
        "mirrored": source.mirrored,
        "codec": source.codec,
        "captions": source.text,
    }
    if source.moments:  # what codec.mean and codec.std would be, at codec.scale 1
        sample = source.gather(numpy_stream(0, "inspect").permutation(len(source))[:1024])[0]
        mean, std = flip(sample, None).double().chunk(2, dim=1)
        found["latent_mean"] = mean.mean((0, 2, 3)).tolist()
        found["latent_std"] = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt().tolist()
    return found | ({"source": source.header["source"]} if isinstance(source, Packed) else {})


def transparent(source: Source) -> float:
    """The share of images with transparency, of the few that are looked at."""
    looked = sorted({i * len(source) // PROBES for i in range(PROBES)})
    found = 0
    for index in looked:
        with suppress(Exception):  # what cannot be read is named elsewhere
            content = source.content(index)
            if content is not None:
                with Image.open(io.BytesIO(content), formats=KNOWN) as image:
                    found += image.has_transparency_data
    return found / len(looked)


def read_speed(source: Source, config: DataConfig, batch_size: int = 256) -> dict[str, float]:
    """Read one shuffled epoch the way training does: `per_s` entries and bytes."""
    dataset, steps, read = (
        TrainingImages(source, config, seed=0),
        max(1, len(source) // batch_size),
        0,
    )
    stream_of_batches = batches(dataset, Chunks(0, batch_size, batch_size), pin_memory=False)
    started = time.perf_counter()
    for _ in range(steps):
        batch = next(stream_of_batches)
        read += batch.images.nbytes
    seconds = time.perf_counter() - started
    return {"entries_per_s": steps * batch_size / seconds, "gib_per_s": read / 2**30 / seconds}


def contact_sheet(source: Source, codec: CodecConfig, count: int) -> Image.Image:
    """Images chosen at random, cropped to squares; latents are decoded by `codec.vae`, or what made
    them.
    """
    chosen = np.sort(numpy_stream(0, "sheet").permutation(len(source))[:count])
    if not isinstance(source, Latents) or not source.moments:
        pictures = []
        for i in chosen:
            with suppress(MsmdiffError):  # which ones is in the report
                pictures.append(center_crop(source.image(int(i)), 96))
        if not pictures:
            raise MsmdiffError(f"none of {len(chosen)} images of {source.spec} can be read")
        return grid(np.stack(pictures))
    entries = flip(source.gather(chosen)[0], None)
    name = source.codec["name"]
    given = codec.model_dump(exclude_unset=True) if codec.name == name else {}
    wanted = section("codec", **{"channels": entries.shape[1] // 2, **given, "name": name})
    registry.find("codec", name, "codec.name").make.complete(wanted, source.codec)
    decoder = codecs.build(wanted, entries.shape[-1] * wanted.factor)
    parts = [
        decoder.decode(decoder.encode(part, stream("cpu", 0, "sheet"))) for part in entries.split(8)
    ]
    return grid(torch.cat(parts).permute(0, 2, 3, 1).numpy())


def pack(
    source: Source,
    out: Path,
    size: int | None,
    progress: Callable[[int, int, dict[str, Any]], None],
    overwrite: bool = False,
) -> None:
    """Write images into a zip: a folder's files as they are, or all of them as PNGs cropped to
    `size`.

    Captions (`NAME.txt`) go with their images.

    Raises what `require_target` does, and MsmdiffError when `out` cannot be written.
    """
    require_target(out, overwrite)
    with files.atomic(out) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        taken: set[str] = set()
        for i in range(len(source)):
            name, content = _packed(source, i, size, taken)
            taken.add(name)
            # Of a fixed date: the same images, the same bytes.
            archive.writestr(zipfile.ZipInfo(name), content)
            _pack_caption(source=source, index=i, name=name, archive=archive, taken=taken)
            progress(i + 1, len(source), {})


def require_target(out: Path, overwrite: bool = False) -> None:
    """Raise UsageError where `out` is no `.zip`, or is there already: nothing tells our archives
    from others.
    """
    if out.suffix.lower() != ".zip":
        raise UsageError(f"-o {out}: give a name that ends in .zip")
    if os.path.lexists(out) and not overwrite:
        raise UsageError(f"-o {out} is there already: give another name, or --overwrite")


def _packed(source: Source, index: int, size: int | None, taken: set[str]) -> tuple[str, bytes]:
    """What an image is called in an archive, and its file, as it is or as a cropped PNG."""
    name, content = source.name(index), source.content(index)
    if size is None and content is not None:
        return name, content
    if content is None:
        folder = ""
        if source.labels is not None:
            folder = f"{source.class_names[source.labels[index]]}/"
        name = f"{folder}{index:08d}.png"
    else:
        other = str(PurePosixPath(name).with_suffix(".png"))
        name = f"{name}.png" if other in taken else other
    image, buffer = source.image(index), io.BytesIO()
    if size is not None:
        image = Image.fromarray(center_crop(image, size))
    image.save(buffer, "PNG")
    return name, buffer.getvalue()


def _pack_caption(
    source: Source, index: int, name: str, archive: zipfile.ZipFile, taken: set[str]
) -> None:
    """The text beside an image, which most images have not."""
    caption = str(PurePosixPath(name).with_suffix(".txt"))
    text = source.caption_file(index)
    if text and caption not in taken:
        taken.add(caption)
        archive.writestr(zipfile.ZipInfo(caption), text)
