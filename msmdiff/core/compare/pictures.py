"""The pictures of a comparison: quality over what it cost, and samples side by side."""

from pathlib import Path
from typing import Any

AXES = {
    "seconds": ("seconds of training", 1.0),
    "flops": ("TFLOP", 1e12),
    "images": ("thousand images seen", 1e3),
}
"""What a measurement has cost: title, and the unit of the axis."""


def draw(arms: dict[str, dict[str, Any]], metrics: dict[str, str], path: Path) -> None:
    """Three panels for everything measured, with a line for every seed and the mean at the end of
    every arm.
    """
    from matplotlib.figure import Figure

    first = next(iter(arms.values()))
    shown = [name for name in metrics if name in first["measured"]]
    figure = Figure(figsize=(12, 4 * len(shown)), layout="constrained")
    rows = figure.subplots(len(shown), len(AXES), sharey="row", squeeze=False)
    for panels, metric in zip(rows, shown, strict=True):
        for axis, (key, (title, unit)) in zip(panels, AXES.items(), strict=True):
            for number, (name, arm) in enumerate(arms.items()):
                _lines(axis, arm, (key, unit, metric), colour=f"C{number % 10}", name=name)
            axis.set(xlabel=title)
            axis.grid(alpha=0.3)
        panels[0].set(ylabel=metrics[metric], yscale="log")
    rows[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _lines(
    axis: Any, arm: dict[str, Any], what: tuple[str, float, str], *, colour: str, name: str
) -> None:
    """A line for every seed of an arm: a metric over what it cost, in a unit."""
    key, unit, metric = what
    label: str | None = name
    ends = []
    for points in arm["curves"].values():
        seen = [point for point in points if point[metric] is not None]
        x = [point[key] / unit for point in seen]
        y = [point[metric] for point in seen]
        axis.plot(x, y, "o-", markersize=3, linewidth=1, color=colour, label=label)
        label = None
        ends.append(x[-1])
    mean = arm["measured"][metric]["mean"]
    axis.plot(sum(ends) / len(ends), mean, "D", color=colour, markersize=6)


def side_by_side(grids: dict[str, Any], path: Path) -> None:
    """The sample grids of all arms, each an uint8 image [H, W, 3] under its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(grids), 4.4), layout="constrained")
    for axis, (name, image) in zip(
        figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True
    ):
        axis.imshow(image, interpolation="nearest")
        axis.set(title=name, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
