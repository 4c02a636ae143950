"""Checkpoints: whole or not there at all, the newest valid one wins, the last few are kept."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from msmdiff.core import files, tensor_files, weights
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
    class_counts: Sequence[int] = (),
) -> Path:
    """Write `checkpoints/img-NNNNNNNNN/` and refresh `weights.safetensors`; then drop all but the
    newest `retain`.

    Args:
        run: the run's directory.
        images_seen: names the checkpoint.
        state: what torch saves beside the weights (optimiser, counters): numbers, text and tensors
            only.
        networks: state dicts by file stem, `model`, any `ema-DECAY` and `width-WIDTH`; the first
            `ema` (else the model) is what sample and finetune take.
        config: goes into every weights file.
        retain: how many checkpoints stay.
        class_names, class_counts: the data's, kept in a conditional network's files for sampling
            and for a next stage.

    Everything goes to a temporary directory that is renamed when it is on the disk, so a kill or a
    full disk leaves the earlier checkpoints as they were. Raises MsmdiffError when it cannot be
    written.
    """
    folder = run / "checkpoints"
    final, part = folder / f"img-{images_seen:09d}", folder / f".img-{images_seen:09d}.part"
    averages = [name for name in networks if name.startswith("ema-")]
    notes = notes_of(config, images_seen, class_names, class_counts)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, tensors in networks.items():
            weights.save(part / f"{name}.safetensors", tensors, config, weights=name, **notes)
        tensor_files.write_torch(part / "state.pt", state)
        files.write_json(part / "DONE", {p.name: _identity(p) for p in part.iterdir()})
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        files.fsync(folder)
        finish(run, (averages or ["model"])[0], retain, images_seen)
    except (OSError, MsmdiffError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise MsmdiffError(
            f"checkpoint at image {images_seen:,} could not be written to {folder}: {reason}; "
            "earlier checkpoints are intact, run the same command again to go on from the newest"
        ) from None
    return final


def notes_of(
    config: Config, images_seen: int, class_names: Sequence[str], class_counts: Sequence[int]
) -> dict[str, str]:
    """What a weights file of a training says of itself, beside its configuration."""
    notes = {"images_seen": str(images_seen)}
    if config.model.num_classes and class_names:
        notes["class_names"] = json.dumps(list(class_names))
        notes["class_counts"] = json.dumps(list(class_counts))
    return notes


def finish(run: Path, stem: str, retain: int, last: int) -> None:
    """What follows a checkpoint, and a kill may have come before: the run's `weights.safetensors`
    is that of the newest, and all but the newest `retain`, and the best one, go; of those of at
    most `last` images.
    """
    whole = [path for path in complete(run) if images_of(path) <= last]
    if not whole:
        return
    publish(whole[-1], run, stem)
    for old in whole[:-retain]:
        if old != _best(run):
            shutil.rmtree(old, ignore_errors=True)


def _best(run: Path) -> Path | None:
    """The checkpoint that a measurement noted as the best."""
    try:
        return run / str(json.loads((run / "best.json").read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None: one whose files all have the sizes that DONE
    recorded. `load` checks what is in them.
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
    for folder in (run, run / "previews", run / "snapshots"):
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
    return torn


def publish(path: Path, run: Path, stem: str) -> None:
    """Make the run's `weights.safetensors` that of a checkpoint, atomically; a link where the file
    system has links.
    """
    source, target = path / f"{stem}.safetensors", run / "weights.safetensors"
    if target.is_file() and target.samefile(source):
        return  # to rename one of two links to a file to the other does nothing, and leaves both
    with files.atomic(target) as part:
        part.unlink(missing_ok=True)
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The state and the networks of a checkpoint, on the CPU.

    Raises MsmdiffError when it cannot be read, or a file is not the one that was written.
    """
    try:
        recorded = _recorded(path)
        for name, identity in recorded.items():
            if "sha256" in identity and files.checksum(path / name) != identity["sha256"]:
                raise MsmdiffError(f"{name} has changed since it was written")
        if lacking := {"state.pt", "model.safetensors"} - recorded.keys():
            raise MsmdiffError(f"it lacks {min(lacking)}")
        state = tensor_files.read(path / "state.pt")
        networks = [name for name in recorded if name.endswith(".safetensors")]
        return state, {Path(name).stem: tensor_files.read(path / name) for name in networks}
    except (OSError, ValueError, MsmdiffError) as error:
        raise MsmdiffError(
            f"checkpoint {path} cannot be read ({error}); remove it to go on from an earlier one"
        ) from None


def _all(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("img-*"), key=images_of)


def images_of(path: Path) -> int:
    """The images seen that a checkpoint's name tells; -1 for another name."""
    digits = path.name.removeprefix("img-")
    return int(digits) if digits.isdigit() else -1


def _identity(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": files.checksum(path)}


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    """What DONE says of each file of a checkpoint: `bytes`, and `sha256` unless it is of an older
    version. Raises OSError or ValueError where it does not say.
    """
    content = json.loads((path / "DONE").read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("DONE lists no files")
    return {k: v if isinstance(v, dict) else {"bytes": v} for k, v in content.items()}


def _is_whole(path: Path) -> bool:
    try:
        recorded = _recorded(path)
        return all((path / name).stat().st_size == v["bytes"] for name, v in recorded.items())
    except (OSError, ValueError, KeyError):
        return False
