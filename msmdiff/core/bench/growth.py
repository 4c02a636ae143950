"""`bench growth`: how the time and memory of a step grow with what the network sees."""

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import files
from msmdiff.core.bench import timing
from msmdiff.core.bench.training import Training, summed_up
from msmdiff.core.config import Config
from msmdiff.core.layers import merge
from msmdiff.core.training.launch import choose_precision

RATIOS = (0.0, 0.25, 0.5, 0.75, 0.9)
FACTORS = (0.25, 0.5, 1.0, 2.0)
"""Of the configuration's batch."""
SIDES = (0.5, 1.0, 2.0)
"""Of the configuration's image size: a quarter of the tokens, as many, four times as many."""


@dataclass
class Point:
    """A step, measured.

    Attributes:
        axis: what was changed: `ratio`, `batch` or `tokens`.
        value: of that.
        ms, gib: of the step, and its peak of memory.
        ideal_ms: what its counted operations would take at the speed of the configuration as it is.
    """

    axis: str
    value: float
    ms: float
    gib: float
    ideal_ms: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(config: Config, device: torch.device, steps: int = 7) -> list[Point]:
    """Change one thing at a time of a resolved configuration, which hides nothing itself."""
    size, batch = config.data.image_size, config.train.batch_size
    asked: list[tuple[str, float, dict[str, Any]]] = [
        ("ratio", ratio, {"objective": {"name": "msm"}, "mask": {"ratio": ratio}})
        if ratio
        else ("ratio", 0.0, {})
        for ratio in RATIOS
    ]
    for factor in FACTORS:
        number = max(1, round(batch * factor))
        asked.append(("batch", number, {"train": {"batch_size": number}}))
    asked += [("tokens", side, {"data": {"image_size": round(size * side)}}) for side in SIDES]
    points: list[Point] = []
    speed = 0.0
    for axis, value, layer in asked:
        changed = _with(config, layer, device)
        training = Training(changed)
        seconds = timing.median_seconds(training, device, steps, warmup=2)
        found = summed_up(training, seconds, peak=1.0)
        speed = speed or found.flops_per_s
        operations = found.flops_per_s * seconds
        points.append(
            Point(
                axis=axis,
                value=found.tokens if axis == "tokens" else value,
                ms=1000 * seconds,
                gib=found.peak_memory_bytes / 2**30,
                ideal_ms=1000 * operations / speed,
            )
        )
        del training
        gc.collect()
    return points


def _with(config: Config, layer: dict[str, Any], device: torch.device) -> Config:
    stored = configuration.stored(merge(config.as_dict(), layer), "the configuration")
    changed = road.resolve(configuration.build(stored))
    changed.train.precision = choose_precision(changed, device.type)
    return changed


def draw(points: list[Point], title: str, path: Path) -> None:
    """A PNG: time and memory over each axis, with the line of what the operations alone ask."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {"ratio": "share of tokens hidden", "batch": "images of a step", "tokens": "tokens"}
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(2, len(names))
    for column, (axis, name) in enumerate(names.items()):
        own = [point for point in points if point.axis == axis]
        at = [point.value for point in own]
        upper, lower = axes[0][column], axes[1][column]
        upper.plot(at, [point.ms for point in own], "o-", label="measured")
        upper.plot(at, [point.ideal_ms for point in own], "--", color="grey", label="operations")
        lower.plot(at, [point.gib for point in own], "o-", color="tab:green")
        lower.set_xlabel(name)
        for plot in (upper, lower):
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms a step")
    axes[1][0].set_ylabel("peak memory, GiB")
    axes[0][0].legend()
    with files.atomic(path) as part:
        figure.savefig(part, format="png", dpi=100)
