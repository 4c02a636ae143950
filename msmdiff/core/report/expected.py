"""Curves to expect: what a training with the same settings came to, drawn behind a run's own.

Those of presets lie in `configs/expected/`, a file each; anyone can store more.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msmdiff.core import files, presets
from msmdiff.core.config import Config, flatten
from msmdiff.core.data import halves
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.training import results

SECTIONS = ("model", "codec", "process", "mask", "objective", "optim", "ema")
KEYS = ("data.image_size", "train.batch_size")
"""Sections and keys on which a curve over the images seen depends, beside the data."""

MEASURED = ("codec.mean", "codec.std")
"""Settings that are measured on the data, and so differ a little between its halves."""

MARK = "msmdiff-curves"

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Expected:
    """Curves of a training.

    Attributes:
        name: of the training.
        told: version and machine.
        settings: those that they depend on, flat.
        curves: key of the log -> (images seen, value).
        measured_as: how the distance of samples was measured; null where it was not.
    """

    name: str
    told: str
    settings: dict[str, Any]
    curves: dict[str, Curve]
    measured_as: Any = None

    def suits(self, config: Config) -> bool:
        """Whether a training has the same settings; keys that came later do not count."""
        now = settings_of(config)
        return all(now.get(key) == value for key, value in self.settings.items())


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that a curve depends on; a half of the data counts as the data."""
    flat = flatten(config.as_dict())
    kept = {k: v for k, v in flat.items() if k.partition(".")[0] in SECTIONS or k in KEYS}
    for key in MEASURED:
        kept.pop(key, None)
    if config.optim.schedule == "constant":
        kept.pop("optim.decay_steps", None)
    kept["data.source"] = halves.parted(config.data.source)[0]
    # As JSON has them: what is stored compares with what is not.
    found: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return found


def of(config: Config) -> Expected | None:
    """The curves of a preset with the settings of a training."""
    for path in sorted((presets.folder() / "expected").glob("*.json")):
        found = read(path)
        if found.suits(config):
            return found
    return None


def read(path: Path) -> Expected:
    """Stored curves. Raises UsageError for another file, and Unreadable."""
    try:
        stored = json.loads(files.read_text(path))
        if stored.pop(MARK) != 1:
            raise ValueError
        curves = {
            str(key): [(float(x), float(y)) for x, y in points]
            for key, points in stored.pop("curves").items()
        }
        found = Expected(curves=curves, **stored)
        if not (isinstance(found.settings, dict) and isinstance(found.name, str)):
            raise TypeError
        return replace(found, told=str(found.told))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(
            f"{path} holds no curves: give a file that `msmdiff report RUN --store FILE` wrote"
        ) from None


def ours(path: Path) -> bool:
    """Whether `write` made a file."""
    try:
        read(path)
    except MsmdiffError:
        return False
    return True


def write(
    path: Path, name: str, config: Config, lines: Sequence[dict[str, Any]], told: str
) -> None:
    """Store the curves of a run. Raises MsmdiffError where that cannot be done."""
    curves = {key: points for key in keys_of(lines) if (points := curve(lines, key))}
    made = Expected(name, told, settings_of(config), curves, measured_as(lines))
    files.write_json(path, {MARK: 1, **asdict(made)})


def keys_of(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of a log that are curves to expect: the losses, and the distance of samples."""
    distance = results.distance_key(lines)
    return ["loss", "val_loss", *([distance] if distance else [])]


def measured_as(lines: Sequence[dict[str, Any]]) -> Any:
    """How the newest distance of samples was measured: others do not compare with it."""
    return next((line["measured_as"] for line in reversed(lines) if "measured_as" in line), None)


def curve(lines: Sequence[dict[str, Any]], key: str) -> Curve:
    """(images seen, value) of every line that has a key."""
    return [(line["images"], line[key]) for line in lines if line.get(key) is not None]
