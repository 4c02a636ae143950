"""Weights files: one self-describing `.safetensors` per network, to sample from or to start from."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import Config
from msmdiff.core.diffusion.codecs import Codec
from msmdiff.core.diffusion.process import Process
from msmdiff.core.errors import MsmdiffError, UsageError

FORMAT_VERSION = 1


@dataclass
class Stored:
    """A weights file as it lies on disk: the tensors, the configuration they belong to, and notes about them."""

    path: Path
    tensors: dict[str, Tensor]
    config: Config
    notes: dict[str, str] = field(default_factory=dict)


@dataclass
class Loaded:
    """A network ready to sample from, with the road around it."""

    backbone: Any
    process: Process
    codec: Codec
    config: Config
    notes: dict[str, str]


def save(path: Path, tensors: dict[str, Tensor], config: Config, **notes: Any) -> None:
    """Write a weights file, atomically: an existing file is replaced only by a whole one.

    The configuration, the format's version and the notes (images seen, which average, ...) go into the metadata.
    """
    metadata = {"format": "msmdiff", "version": str(FORMAT_VERSION), "config": config.to_json()}
    metadata |= {name: str(value) for name, value in notes.items()}
    part = path.with_name(f".{path.name}.part")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, metadata)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def read(path: Path) -> Stored:
    """Read a weights file onto the CPU.

    Raises MsmdiffError for a file that is missing, truncated, of another format or from a newer version. Nothing in
    it is executed: safetensors holds numbers and text only.
    """
    metadata = read_notes(path)
    config = configuration.build(json.loads(metadata.pop("config")))
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise MsmdiffError(f"{path} is truncated or damaged: {error}") from None
    return Stored(path, tensors, config, metadata)


def read_notes(path: Path) -> dict[str, str]:
    """The metadata of a weights file, its configuration as JSON under `config`; raises as `read` does."""
    if not path.is_file():
        raise MsmdiffError(f"{path} does not exist: give a run directory or a weights file (.safetensors)")
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise MsmdiffError(f"{path} is not a whole safetensors file: {error}") from None
    if metadata.get("format") != "msmdiff" or "config" not in metadata:
        raise MsmdiffError(
            f"{path} is a safetensors file, but carries no msmdiff configuration: not written by msmdiff"
        )
    if int(metadata.pop("version", "0")) > FORMAT_VERSION:
        raise MsmdiffError(f"{path} was written by a newer msmdiff; this one reads format {FORMAT_VERSION}: upgrade it")
    del metadata["format"]
    return metadata


def load(path: Path, device: torch.device | str = "cpu") -> Loaded:
    """Build the network a weights file describes, with its numbers, in evaluation mode on `device`.

    Raises MsmdiffError where the file's tensors are not exactly the network's.
    """
    stored = read(path)
    parts = road.build(stored.config)
    try:
        parts.backbone.load_state_dict(stored.tensors)
    except RuntimeError as error:
        raise MsmdiffError(f"{path} does not hold the network that it describes: {error}") from None
    backbone = parts.backbone.to(device).eval().requires_grad_(False)
    return Loaded(backbone, parts.process.to(device), parts.codec, stored.config, stored.notes)


def locate(source: str | Path, runs: Path = Path("runs"), ema: float | None = None) -> Path:
    """The weights file that a user means by a file, a run directory, or a run's name.

    `ema` picks another average of a run than the first: that of its newest checkpoint. Raises UsageError when there
    is no such run, or none of its weights yet.
    """
    for path in (Path(source), runs / source):
        if path.is_dir():
            if ema is not None:
                averages = sorted(path.glob(f"checkpoints/img-*/ema-{ema:g}.safetensors"))
                if not averages:
                    raise UsageError(f"{path} has no average with decay {ema:g} in its checkpoints")
                return averages[-1]
            if not (path / "weights.safetensors").is_file():
                raise UsageError(f"{path} holds no weights.safetensors: is it a run that has saved a checkpoint?")
            return path / "weights.safetensors"
        if path.is_file():
            return path
    raise UsageError(f"'{source}' is neither a weights file nor a run directory, here or under {runs}/")


def newest(runs: Path = Path("runs")) -> Path:
    """The run that saved weights last. Raises UsageError when there is none."""
    found = list(runs.glob("*/weights.safetensors"))
    if not found:
        raise UsageError(
            f"no run with weights under {runs}/: name a run or a file, or train one with `msmdiff pretrain`"
        )
    return max(found, key=lambda p: p.stat().st_mtime).parent


def checksum(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
