"""A run: its directory, who may write there, what it was started with, its log, and what it
reports.
"""

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

import msmdiff
from msmdiff.core import config as configuration
from msmdiff.core import files, presets, weights
from msmdiff.core.config import Config
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.training import changes, checkpoint, posthoc


class Reporter(Protocol):
    """Where a training's messages go; the command line has one."""

    def note(self, text: str) -> None: ...

    def progress(self, images_seen: int, total: int, metrics: dict[str, Any]) -> None: ...

    def activity(self, what: str, done: int, total: int) -> None:
        """Something between steps that takes time, such as drawing: `done` of `total` parts."""


@runtime_checkable
class Panels(Protocol):
    """A reporter that shows several things to know at once; others are told each in a note."""

    def panel(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """`rows` are (what, text)."""


def show(reporter: Reporter, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Tell several things at once, in the way that the reporter has."""
    if isinstance(reporter, Panels):
        reporter.panel(title, rows)
        return
    for what, text in rows:
        reporter.note(f"{what}: {text}")


@dataclass
class Summary:
    """How a training ended."""

    run: Path
    images_seen: int
    steps: int
    seconds: float
    writes: bool = True
    """Whether this process is the one of several that reports."""
    interrupted: int | None = None
    """The signal that ended it early, if one did."""
    remark: str = ""
    """What to know of its weights before they are used."""


class Run:
    """The directory of one training run; the unit of resuming.

    Args:
        path: made when it does not exist.
        writes: whether this process is the one that writes (the first of several).

    Raises MsmdiffError when the directory cannot be written, or another process is training there.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._lock: files.Lock | None = None
        self._changes: list[changes.Change] = []
        if not writes:
            return
        for name in ("config.yaml", "weights.safetensors"):
            if (path / name).exists() and not self._is_run():
                raise UsageError(
                    f"{path / name} was not written by a training: move it, or give another --run"
                )
        try:
            (path / "previews").mkdir(parents=True, exist_ok=True)
            self._lock = files.Lock(
                path / ".lock",
                f"another process is training in {path}: wait for it, or give another --run",
            )
        except OSError as error:
            raise MsmdiffError(
                f"run directory {path} cannot be written: {error.strerror or error}"
            ) from None

    def _is_run(self) -> bool:
        """Whether a training of ours wrote in this directory."""
        return (self.path / "run.json").is_file() or checkpoint.newest(self.path) is not None

    def stored_config(self) -> Config | None:
        """The configuration this run was started with, or None for a new run.

        Where `config.yaml` is lost or empty, its newest checkpoint tells: weights carry it too.
        """
        if text := self._config_text():
            content = presets.parse_yaml(text, str(self.path / "config.yaml"))
            return configuration.build(configuration.stored(content, str(self.path)))
        newest = checkpoint.newest(self.path)
        return weights.stored_config(newest / "model.safetensors") if newest else None

    def lost_config(self) -> bool:
        """Whether the run has checkpoints, but its `config.yaml` is lost or empty."""
        return not self._config_text() and checkpoint.newest(self.path) is not None

    def _config_text(self) -> str:
        path = self.path / "config.yaml"
        with files.reading(path, "a configuration"):
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # A power cut may leave an empty file, or zeros.
        return text.strip("\0\n ")

    def begun(self) -> Config | None:
        """The configuration of a run that has a whole checkpoint to go on from, else None."""
        return self.stored_config() if checkpoint.newest(self.path) else None

    def admit(self, config: Config, allow_change: bool = False) -> list[str]:
        """Check that `config` continues what this run computed; what to tell of what differs.

        Raises UsageError with the differences, see `changes.admitted`.
        """
        newest = checkpoint.newest(self.path)
        begun = self.stored_config() if newest else None
        if newest is None or begun is None:
            return []
        seen = checkpoint.images_of(newest)
        notes, self._changes = changes.admitted(self.path, begun, config, seen, allow_change)
        return notes

    def start(self, config: Config, command: str, images_seen: int) -> None:
        """Record the configuration and the circumstances; drop log lines and snapshots past
        `images_seen`.
        """
        if not self.writes:
            return
        # First what tells the directory from a foreign one (`_is_run`).
        made = changes.as_records(self._changes)
        known = {"changes": [*self._earlier_changes(), *made]}
        files.write_json(self.path / "run.json", _circumstances(command) | known)
        files.write_text(self.path / "config.yaml", config.to_yaml())
        posthoc.forget(self.path, images_seen)
        kept = [line for line in self._lines() if line["images"] <= images_seen]
        files.write_text(
            self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept)
        )

    def _earlier_changes(self) -> list[Any]:
        """What was changed knowingly in earlier starts; none where that cannot be read."""
        try:
            stored = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        found = stored.get("changes", []) if isinstance(stored, dict) else []
        return found if isinstance(found, list) else []

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self.writes:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._lines()

    def close(self) -> None:
        """Let another process in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _lines(self) -> list[dict[str, Any]]:
        path, lines = self.path / "metrics.jsonl", []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # a kill in the middle of a line: the rest is written again
        return lines


def _revision() -> str | None:
    """The commit of the checkout that runs, where there is one and git is installed."""
    package = str(Path(msmdiff.__file__).parent)
    command = ["git", "-C", package, "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _circumstances(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "msmdiff": msmdiff.__version__,
        "git": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }
