"""Training from Python: one function, with the defaults of the command line."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msmdiff.core import config as configuration
from msmdiff.core import presets, weights
from msmdiff.core.config import Config
from msmdiff.core.data import sources
from msmdiff.core.layers import merge
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
    preset: str | None = None,
    tell: Callable[[str], None] = print,
) -> Model:
    """Train a network, and return it ready to draw from: `train({"data": {"source": "photos/"}})`.

    Args:
        settings: a nested configuration, such as {"data": {"source": "photos/"}, "train": {"steps":
            500}}; keys with dots do as well: {"train.steps": 500}. What is left open suits the
            data, see `defaults`.
        run: the run's directory. The same call goes on with a run that is there.
        preset: a preset's name or a YAML file, under the settings.
        tell: takes the lines that the command line would show.

    Raises UsageError for settings that cannot work or differ from the run's, and MsmdiffError when
    training has to stop.
    """
    config = _configured(dict(settings or {}), preset, Path(run), tell)
    trainers.train(config, Path(run), Teller(tell), command="msmdiff.train")
    return weights.load(run)


def _configured(
    settings: dict[str, Any], preset: str | None, run: Path, tell: Callable[[str], None]
) -> Config:
    dotted = {key: value for key, value in settings.items() if "." in key}
    nested = {key: value for key, value in settings.items() if "." not in key}
    given = merge(nested, configuration.nest(dotted))
    source = (given.get("data") or {}).get("source")
    begun = trainers.Run(run, writes=False).begun()
    under: list[dict[str, Any]] = []
    if preset is not None:
        under.append(presets.read(preset))
    elif begun is not None:
        under.append(configuration.stored(begun.as_dict(), str(run)))
    elif source is None:
        under.append(presets.read("digits-finetune"))
    elif source.partition(":")[0] != "digits":
        data = configuration.section("data", **given["data"])
        choice = defaults.choose(given, defaults.facts_of(sources.open_configured(data)))
        tell(choice.reason)
        under.append(choice.layer)
    return configuration.build(*under, given)
