"""Whole files of every kind that is opened, and what becomes of them when bytes change."""

import io
import json
import random
import re
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from msmdiff.core import backbones, presets, weights
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.data import encode, npy, sources, text
from msmdiff.core.data.latents import Latents
from msmdiff.core.diffusion import codecs
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.layers import SECTIONS
from msmdiff.core.metrics import statistics
from msmdiff.core.sections import ModelConfig
from msmdiff.core.weights import published

SECONDS = 10.0
"""What opening one file may take, on a busy machine."""

UVIT = dict(patch_size=4, hidden_size=8, depth=3, num_heads=2)


def _picture(i: int) -> bytes:
    rng, content = np.random.default_rng(i), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(content, "png")
    return content.getvalue()


def _read_source(path: Path) -> None:
    source = sources.open_source(str(path))
    for i in range(min(len(source), 20)):
        source.image(i)


def _read_beside(path: Path) -> None:
    """A folder's file: the folder is read."""
    source = sources.open_source(str(path.parent))
    if isinstance(source, Latents):
        source.gather(np.arange(len(source)))
    else:
        _read_source(path.parent)


def _configured(path: Path) -> None:
    content = presets.read(str(path))
    try:
        road.resolve(configuration.build(content), 10)
    except UsageError as error:
        require_key(str(error))
        raise UsageError(f"{path.name}: {error}") from None


def require_key(sentence: str) -> None:
    """Refuse a sentence about a configuration that names no section or key."""
    names = "|".join(map(re.escape, (*SECTIONS, "key", "section", "configuration")))
    assert re.search(rf"\b({names})\b", sentence), sentence
    assert "\n" not in sentence, sentence


def _captions(path: Path) -> None:
    text.read_captions(sources.open_source(str(path.with_name("images.zip"))), str(path))


OPENERS: dict[str, Callable[[Path], Any]] = {
    "images.zip": _read_source,
    "samples.npz": _read_source,
    "cifar-10-binary.tar.gz": _read_source,
    "pair.npy": npy.load_pair,
    "array.npy": npy.load,
    "ours.safetensors": weights.read,
    "published.pt": lambda path: weights.read(path, {"num_heads": 2}),
    "plain.safetensors": lambda path: weights.read(path, {"num_heads": 2}),
    "statistics.npz": statistics.load,
    "mine.yaml": _configured,
    "captions.json": _captions,
    "lsun_lmdb/data.mdb": _read_beside,
    **{
        f"packed/{name}": _read_beside
        for name in ("packed.json", "entries.npy", "labels.npy", "names.txt", "shards.txt")
    },
}
"""File -> what opens it."""


def originals(folder: Path) -> None:
    """Write a whole one of each."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"class{i % 2}/{i}.png", _picture(i))
    pixels = rng.integers(0, 255, (4, 8, 8, 3), np.uint8)
    np.savez_compressed(folder / "samples.npz", pixels, np.arange(4))
    _write_cifar(folder / "cifar-10-binary.tar.gz", rng)
    pair = np.empty(2, object)
    pair[:] = [rng.random((8, 4, 4), np.float32), 3]
    np.save(folder / "pair.npy", pair, allow_pickle=True)
    np.save(folder / "array.npy", rng.random((8, 4, 4), np.float32))
    _write_weights(folder)
    mean, rows = rng.random(6), rng.random((20, 6))
    np.savez(folder / "statistics.npz", mu=mean, sigma=np.cov(rows.T), count=20, features="pixel")
    config = road.resolve(configuration.build({}), 10)
    (folder / "mine.yaml").write_text(config.to_yaml())
    (folder / "captions.json").write_text(
        json.dumps({f"class{i % 2}/{i}.png": f"picture {i}" for i in range(4)})
    )
    with (
        lmdb.open(str(folder / "lsun_lmdb"), map_size=2**20) as there,
        there.begin(write=True) as change,
    ):
        for i in range(20):
            change.put(f"{i:04d}".encode(), _picture(i))
    _pack(folder / "images.zip", folder / "packed")


def _pack(images: Path, folder: Path) -> None:
    data = configuration.section("data", source=str(images), image_size=8)
    codec = codecs.build(configuration.section("codec"), 8)
    source = sources.open_source(str(images))
    encode.encode(source, codec, data, folder, lambda *_: None, shard=2)


def _write_cifar(path: Path, rng: np.random.Generator) -> None:
    names = "\n".join(f"class{i}" for i in range(10)).encode()
    members = {"batches.meta.txt": names}
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        rows = rng.integers(0, 255, (2, 3073), np.uint8)
        rows[:, 0] %= 10
        members[name] = rows.tobytes()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def _write_weights(folder: Path) -> None:
    model = backbones.resolve(ModelConfig(name=None, family="uvit", num_classes=0, **UVIT))
    torch.manual_seed(0)
    tensors = backbones.build(model, (3, 8, 8)).state_dict()
    config = configuration.build(
        {"model": model.model_dump(), "data": {"image_size": 8}, "process": {"prediction": "x0"}}
    )
    weights.save(folder / "ours.safetensors", tensors, road.resolve(config))
    theirs = published.export(tensors, model, (3, 8, 8), "uvit")
    torch.save({k: v.contiguous() for k, v in theirs.items()}, folder / "published.pt")
    save_file({k: v.contiguous() for k, v in theirs.items()}, folder / "plain.safetensors")


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut off, doubled, moved or zeroed."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        place = draw.randrange(max(1, len(changed)))
        span = draw.choice((1, 2, 4, 8, 64, 512))
        how = draw.randrange(6)
        if how == 0:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif how == 1:
            del changed[place:]
        elif how == 2:
            changed[place:place] = changed[place : place + span]
        elif how == 3:
            del changed[place : place + span]
        elif how == 4:
            changed[place : place + span] = bytes(len(changed[place : place + span]))
        else:
            changed[place : place + span] = draw.randbytes(span)
    return bytes(changed)


def attack(folder: str, name: str, count: int, first: int = 0) -> dict[str, Any]:
    """Open `count` mutations of a file: how many opened, and what went wrong otherwise than by a
    sentence that names the file.
    """
    place = Path(folder)
    originals(place)
    path, opened, problems = place / name, 0, []
    content = path.read_bytes()
    OPENERS[name](path)  # the whole one does open
    for seed in range(first, first + count):
        path.write_bytes(mutated(content, random.Random(f"{name} {seed}")))
        began = time.monotonic()
        try:
            OPENERS[name](path)
            opened += 1
        except MsmdiffError as error:
            named = any(part in str(error) for part in Path(name).parts)
            if not named or "more memory" in str(error) or "\n" in str(error):
                problems.append(f"{seed}: {error}")
        except BaseException as error:
            problems.append(f"{seed}: {error!r}")
        if time.monotonic() - began > SECONDS:
            problems.append(f"{seed}: {time.monotonic() - began:.1f} s")
    return {"opened": opened, "problems": problems}
