"""Training from Python: one function, with the defaults of the command line."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msmdiff.core import config as configuration
from msmdiff.core import weights
from msmdiff.core.config import Config
from msmdiff.core.data import sources
from msmdiff.core.errors import UsageError
from msmdiff.core.model import Model
from msmdiff.core.training import defaults
from msmdiff.core.training import trainer as trainers


class Teller:
    """A reporter that hands lines on, and keeps the last figures in `metrics`."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.note = tell
        self.metrics: dict[str, Any] = {}

    def progress(self, images_seen: int, total: int, metrics: dict[str, Any]) -> None:
        self.metrics = metrics

    def activity(self, what: str, done: int, total: int) -> None:
        pass


def train(
    settings: Mapping[str, Any] | None = None,
    *,
    run: str | Path = "runs/python",
    preset: str | Path | None = None,
    tell: Callable[[str], None] = print,
) -> Model:
    """Train a network, and return it ready to draw from: `train({"data": {"source": "photos/"}})`.

    Args:
        settings: a nested configuration, such as {"data": {"source": "photos/"}, "train": {"steps":
            500}}; keys with dots do as well: {"train.steps": 500}. Paths may be `Path` objects.
            What is left open suits the data, see `defaults`; without data, network and preset it
            is that of the preset digits-finetune.
        run: the run's directory. The same call goes on with a run that is there.
        preset: a preset's name or a YAML file, under the settings.
        tell: takes the lines that the command line would show.

    Raises UsageError for settings that cannot work or differ from the run's, and MsmdiffError when
    training has to stop. After Ctrl-C or SIGTERM the step is finished and saved; then it raises
    KeyboardInterrupt, or SystemExit for SIGTERM.
    """
    config = _configured(settings or {}, preset, Path(run), tell)
    summary = trainers.train(config, Path(run), Teller(tell), command="msmdiff.train")
    if summary.interrupted is not None:
        tell(f"interrupted at image {summary.images_seen:,}: the same call goes on with {run}")
        if summary.interrupted == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + summary.interrupted)
    return weights.load(run)


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots as sections, and paths as text."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = out
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UsageError(f"{name} was given {node!r}: it cannot hold {leaf} too")
        if isinstance(value, Mapping):
            before = node.get(leaf)
            node[leaf] = {**(before if isinstance(before, dict) else {}), **_nested(value)}
        else:
            node[leaf] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _configured(
    settings: Mapping[str, Any], preset: str | Path | None, run: Path, tell: Callable[[str], None]
) -> Config:
    given = _nested(settings)
    source, network = (
        part.get(key) if isinstance(part := given.get(name), dict) else None
        for name, key in (("data", "source"), ("model", "name"))
    )
    begun = trainers.Run(run, writes=False).begun()
    under: list[dict[str, Any]] = []
    if preset is not None:
        under.append(configuration.preset(str(preset)))
    elif begun is not None:
        under.append(configuration.stored(begun.as_dict(), str(run)))
    elif source is None:
        if not network:
            under.append(configuration.preset("digits-finetune"))
    elif defaults.chosen_for(str(source)):
        data = configuration.section("data", **given["data"])
        choice = defaults.choose(given, defaults.facts_of(sources.open_configured(data)))
        tell(choice.reason)
        under.append(choice.layer)
    return configuration.build(*under, given)
