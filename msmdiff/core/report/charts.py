"""Curves as SVG, by hand: they scale, follow the page's colours, and weigh little."""

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 12, 34
COLOURS = ("#2f6fde", "#d9542b", "#2a9d5c", "#9b59b6", "#b8860b", "#17808f", "#c2255c", "#666f7a")
BEHIND = "#8a9099"
MOST_POINTS = 400


def chart(
    title: str,
    curves: Mapping[str, Points],
    log: bool = False,
    behind: Mapping[str, Points] | None = None,
) -> str:
    """A figure of named curves over the images seen, with a legend; empty without points.

    Args:
        log: a logarithmic axis of values, where all are positive.
        behind: curves to compare with, in grey and dashed.
    """
    own = {name: _thinned(points) for name, points in curves.items() if points}
    if not own:
        return ""
    grey = {name: _thinned(points) for name, points in (behind or {}).items() if points}
    drawn = {**grey, **own}
    values = [y for points in drawn.values() for _, y in points]
    log = log and min(values) > 0
    scale = math.log10 if log else float
    low, high = scale(min(values)), scale(max(values))
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    last = max(x for points in drawn.values() for x, _ in points) or 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        down = TOP + (HEIGHT - TOP - BOTTOM) * (high - scale(y)) / (high - low)
        return f"{across:.1f},{down:.1f}"

    parts = [_axes(low, high, last, log)]
    keys = []
    for i, (name, points) in enumerate(drawn.items(), start=-len(grey)):
        colour = BEHIND if name in grey else COLOURS[i % len(COLOURS)]
        dashed = ' stroke-dasharray="5 4"' if name in grey else ""
        path = " ".join(place(x, y) for x, y in points)
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dashed} points="{path}"/>'
        )
        if len(points) == 1:
            x, y = place(*points[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        keys.append(f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>')
    legend = f'<div class="key">{"".join(keys)}</div>' if len(drawn) > 1 else ""
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def _thinned(points: Points) -> Points:
    """As many points as a picture shows; the last one always."""
    step = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::step])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _axes(low: float, high: float, last: float, log: bool) -> str:
    lines = []
    for i in range(5):
        value = low + (high - low) * i / 4
        down = TOP + (HEIGHT - TOP - BOTTOM) * (1 - i / 4)
        shown = f"{10**value if log else value:.3g}"
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down}" y2="{down}"'
        lines.append(f'<line {ends} class="grid"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{down + 4}" text-anchor="end">{shown}</text>')
    for i in range(3):
        across = LEFT + (WIDTH - LEFT - RIGHT) * i / 2
        anchor = ("start", "middle", "end")[i]
        shown = short(last * i / 2)
        lines.append(f'<text x="{across}" y="{HEIGHT - 18}" text-anchor="{anchor}">{shown}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">images seen</text>')
    return "".join(lines)


def short(count: float) -> str:
    """A number of images in few characters: 12.8k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"
