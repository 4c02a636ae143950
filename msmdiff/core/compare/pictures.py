"""The pictures of a comparison: quality over what it cost, and samples side by side."""

from pathlib import Path
from typing import Any

AXES = {
    "seconds": ("seconds of training", 1.0),
    "flops": ("TFLOP", 1e12),
    "images": ("thousand images seen", 1e3),
}
"""What a measurement has cost: title, and the unit of the axis."""


def draw(arms: dict[str, dict[str, Any]], metric: str, path: Path) -> None:
    """Three panels with a line for every seed and the mean at the end of every arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axis, (key, (title, unit)) in zip(panels, AXES.items(), strict=True):
        for number, (name, arm) in enumerate(arms.items()):
            colour = f"C{number % 10}"
            label: str | None = name
            for points in arm["curves"].values():
                x = [point[key] / unit for point in points]
                y = [point["value"] for point in points]
                axis.plot(x, y, "o-", markersize=3, linewidth=1, color=colour, label=label)
                label = None
            end = [points[-1][key] / unit for points in arm["curves"].values()]
            axis.plot(sum(end) / len(end), arm["mean"], "D", color=colour, markersize=6)
        axis.set(xlabel=title)
        axis.grid(alpha=0.3)
    panels[0].set(ylabel=metric, yscale="log")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


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
