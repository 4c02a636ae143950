"""Checkpoints: whole or not there at all, the newest valid one wins, the last few are kept."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msmdiff.core import files, weights
from msmdiff.core.config import Config
from msmdiff.core.errors import MsmdiffError


def save(
    run: Path,
    images_seen: int,
    state: dict[str, Any],
    networks: dict[str, dict[str, Tensor]],
    config: Config,
    retain: int,
    class_names: Sequence[str] = (),
) -> Path:
    """Write `checkpoints/img-NNNNNNNNN/` and refresh `weights.safetensors`; then drop all but the
    newest `retain`.

    Args:
        run: the run's directory.
        images_seen: names the checkpoint.
        state: what torch saves beside the weights (optimiser, counters): numbers, text and tensors
            only.
        networks: state dicts by file stem, `model` and any `ema-DECAY`; the first average (else the
            model) is what sample and finetune take.
        config: goes into every weights file.
        retain: how many checkpoints stay.
        class_names: the data's, kept in a conditional network's files for a next stage.

    Everything goes to a temporary directory that is renamed when it is on the disk, so a kill or a
    full disk leaves the earlier checkpoints as they were. Raises MsmdiffError when it cannot be
    written.
    """
    folder = run / "checkpoints"
    final, part = folder / f"img-{images_seen:09d}", folder / f".img-{images_seen:09d}.part"
    averages = [name for name in networks if name != "model"]
    notes = {"images_seen": str(images_seen)}
    if config.model.num_classes and class_names:
        notes["class_names"] = json.dumps(list(class_names))
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, tensors in networks.items():
            weights.save(part / f"{name}.safetensors", tensors, config, weights=name, **notes)
        torch.save(state, part / "state.pt")
        sizes = {p.name: p.stat().st_size for p in part.iterdir()}
        (part / "DONE").write_text(json.dumps(sizes))
        for path in [*part.iterdir(), part]:
            files.fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        files.fsync(folder)
        publish(final, run, (averages or ["model"])[0])
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors wrap a full disk in their own
        shutil.rmtree(part, ignore_errors=True)
        raise MsmdiffError(
            f"checkpoint at image {images_seen:,} could not be written to {folder}: {error}; "
            "earlier checkpoints are intact, run the same command again to go on from the newest"
        ) from None
    for old in [path for path in complete(run) if _images(path) <= images_seen][:-retain]:
        if old != _best(run):
            shutil.rmtree(old, ignore_errors=True)
    return final


def _best(run: Path) -> Path | None:
    """The checkpoint that a measurement noted as the best."""
    try:
        return run / str(json.loads((run / "best.json").read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None: one whose files all have the sizes that DONE
    recorded.
    """
    return next((path for path in reversed(_all(run)) if _is_whole(path)), None)


def complete(run: Path) -> list[Path]:
    """Every whole checkpoint of a run, in the order of training."""
    return [path for path in _all(run) if _is_whole(path)]


def clear_torn(run: Path) -> list[Path]:
    """Remove what a kill or a full disk left half written; returns the checkpoints that were.

    Raises MsmdiffError, and removes nothing, when no checkpoint is whole: starting over is the
        user's to say.
    """
    torn = [path for path in _all(run) if not _is_whole(path)]
    if torn and newest(run) is None:
        raise MsmdiffError(
            f"no checkpoint under {run / 'checkpoints'} is whole (the newest is {torn[-1].name}): "
            "restore one, or "
            "remove that folder to start over"
        )
    for path in [*torn, *(run / "checkpoints").glob(".img-*.part")]:
        shutil.rmtree(path, ignore_errors=True)
    return torn


def publish(path: Path, run: Path, stem: str) -> None:
    """Make the run's `weights.safetensors` that of a checkpoint, atomically; a link where the file
    system has links.
    """
    target = run / "weights.safetensors"
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(path / f"{stem}.safetensors", part)
    except OSError:
        shutil.copyfile(path / f"{stem}.safetensors", part)
        files.fsync(part)
    part.replace(target)


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The state and the networks of a checkpoint, on the CPU. Raises MsmdiffError when it cannot be
    read.
    """
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return state, {p.stem: load_file(p) for p in path.glob("*.safetensors")}
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise MsmdiffError(
            f"checkpoint {path} cannot be read ({error}); remove it to go on from an earlier one"
        ) from None


def _all(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("img-*"), key=_images)


def _images(path: Path) -> int:
    digits = path.name.removeprefix("img-")
    return int(digits) if digits.isdigit() else -1


def _is_whole(path: Path) -> bool:
    try:
        sizes = json.loads((path / "DONE").read_text())
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
