"""Pictures and figures of finished and unfinished runs: `results.png`, and one row a run."""

import os
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from msmdiff.core import figure_files, files, registry
from msmdiff.core.config import Config
from msmdiff.core.diffusion import alignment
from msmdiff.core.diffusion.coverage import scores_kept
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.training.run import Run
from msmdiff.core.training.validation import EDGES

WORTH_A_PICTURE = 10
"""Lines of the log; a curve of fewer points says less than they."""

SPACES = {"pixel": "pixels", "dwt": "wavelets", "vae": "latents"}


def meaning(config: Config) -> str:
    """What the training loss is an error of: losses with other words do not compare."""
    entry = registry.entries("objective").get(config.objective.name)
    kind = None if entry is None else entry.make(**entry.takes(config.objective))
    error = getattr(kind, "error", "error")
    over = getattr(kind, "over", "the visible tokens" if scores_kept(config) else "all tokens")
    space = SPACES.get(config.codec.name, config.codec.name)
    weighting = config.process.weighting
    weighted = "" if weighting == "uniform" else f", weighted by {weighting}"
    whole = f"{error} of {config.process.prediction} in {space}{weighted}, over {over}"
    return whole + alignment.words(config.objective)


def of_run(run: Run, config: Config) -> None:
    """`results.png` of a run that is under way, where there is a curve to draw."""
    lines = run.metrics()
    if (
        len(lines) >= WORTH_A_PICTURE
        or distance_key(lines) is not None
        or len(_points(lines, "val_loss")) > 1
    ):
        draw(run.path, lines, config)


def draw(run: Path, lines: Sequence[dict[str, Any]], config: Config) -> None:
    """`results.png` in a run's directory, from the lines of its log: loss, held-out loss by noise
    level, distance and speed, over the images seen; a panel only where there is something.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in (_loss, _heldout, _distance, _speed) if panel(None, lines, config)]
    if not panels:
        return
    figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, lines, config)
        axis.set_xlabel("images seen")
    figure.suptitle(run.name, fontsize=10)
    with files.atomic(run / "results.png") as part:
        figure.savefig(part, format="png", dpi=100)


Lines = Sequence[dict[str, Any]]


def _points(lines: Lines, key: str) -> list[tuple[int, float]]:
    return [(line["images"], line[key]) for line in lines if line.get(key) is not None]


def _loss(axis: Any, lines: Lines, config: Config) -> bool:
    points = _points(lines, "loss")
    if axis is not None:
        axis.plot(*zip(*points, strict=True), linewidth=1)
        words = textwrap.fill(meaning(config), 64)  # as wide as the panel
        axis.set_title(f"training loss\n{words}", fontsize=8)
    return bool(points)


def _heldout(axis: Any, lines: Lines, config: Config) -> bool:
    points = _points(lines, "val_loss")
    if axis is not None:
        for number, (low, high) in enumerate(pairwise(EDGES)):
            if binned := _points(lines, f"val_loss_{number}"):
                label = f"log-SNR {low:g} to {high:g}"
                axis.plot(*zip(*binned, strict=True), linewidth=1, label=label)
        axis.plot(*zip(*points, strict=True), "k.-", label="mean")
        axis.set_yscale("log")
        axis.set_title("held-out loss by noise level\ncompares in one space", fontsize=8)
        axis.legend(fontsize=6)
    return bool(points)


def distance_key(lines: Lines) -> str | None:
    """The key of the samples' distance in the newest line that has one."""
    for line in reversed(lines):
        if "eval_n" in line:
            apart = ("images", "step", "eval_n", "saved", "measured_as")
            return next((key for key in line if key not in apart), None)
    return None


def _distance(axis: Any, lines: Lines, config: Config) -> bool:
    key = distance_key(lines)
    if axis is not None and key is not None:
        axis.plot(*zip(*_points(lines, key), strict=True), "o-", markersize=3)
        axis.set_title(f"{key} of {lines_with(lines, key)[-1]['eval_n']:,} samples", fontsize=8)
    return key is not None


def lines_with(lines: Lines, key: str) -> list[dict[str, Any]]:
    """The lines that have a key."""
    return [line for line in lines if key in line]


def _speed(axis: Any, lines: Lines, config: Config) -> bool:
    points = _points(lines, "images_per_s")
    if axis is not None:
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_ylim(bottom=0)
        axis.set_title("images per second", fontsize=8)
    return bool(points)


# ------------------------------------------------------------------ many runs


@dataclass
class Standing:
    """How a run stands, from its directory alone."""

    name: str
    steps: int
    of: int
    loss: float | None
    heldout: float | None
    distance: float | None
    metric: str | None
    images_per_s: float | None
    bytes: int
    changed: float
    meaning: str

    @property
    def age(self) -> str:
        """How long ago it was written, for people."""
        seconds = max(0.0, time.time() - self.changed)
        for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
            if seconds >= size:
                return f"{seconds / size:.0f} {unit} ago"
        return "now"


def standing(path: Path) -> Standing | None:
    """How the run in a directory stands; None where there is none that can be read."""
    try:
        run = Run(path, writes=False)
        config, lines = run.stored_config(), run.metrics()
    except MsmdiffError:
        return None
    if config is None:
        return None
    key = distance_key(lines)
    logged = [line for line in lines if "loss" in line]
    last = logged[-1] if logged else {}
    written = _written(path)
    heldout, distance = _points(lines, "val_loss"), _points(lines, key) if key else []
    return Standing(
        name=path.name,
        steps=last.get("step", 0),
        of=config.train.steps,
        loss=last.get("loss"),
        heldout=heldout[-1][1] if heldout else None,
        distance=distance[-1][1] if distance else None,
        metric=key,
        images_per_s=last.get("images_per_s"),
        bytes=sum(found.st_size for found in written),
        changed=max((found.st_mtime for found in written), default=0.0),
        meaning=meaning(config),
    )


def _written(path: Path) -> list[os.stat_result]:
    """What the system says of the files below a folder; a training may replace some meanwhile."""
    found = []
    for folder, _, names in os.walk(path):  # which passes over a folder that went away
        for name in names:
            with suppress(OSError):
                found.append(Path(folder, name).stat())
    return found


PLOTTED_BY = "msmdiff runs"


def ours(path: Path) -> bool:
    """Whether `compare` drew a picture."""
    return figure_files.ours(path, PLOTTED_BY)


def compare(runs: Sequence[Path], out: Path) -> None:
    """One picture of several runs: losses (which compare only where they mean the same), held-out
    losses and distances, over the images seen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for path in runs:
        run = Run(path, writes=False)
        config, lines = run.stored_config(), run.metrics()
        label = path.name if config is None else f"{path.name}: {meaning(config)}"
        for axis, key in zip(axes, ("loss", "val_loss", distance_key(lines)), strict=True):
            points = _points(lines, key) if key else []
            if points:
                shown = label if key == "loss" else path.name
                axis.plot(*zip(*points, strict=True), ".-", linewidth=1, markersize=3, label=shown)
    titles = ("training loss: compare only equal words", "held-out loss", "distance of samples")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("images seen")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    figure_files.save(figure, out, 110, PLOTTED_BY)
