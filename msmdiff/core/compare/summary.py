"""Several comparisons side by side: one table, and what the arms gain over the number of tokens and
over the length of an unmasked tail.

A gain is told beside the first arm, seed by seed: the ratio of what decides, below 1 where the arm
is better.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msmdiff.core import figure_files, files
from msmdiff.core.compare.figures import summed_up
from msmdiff.core.errors import MsmdiffError, UsageError

COMPARED = ("distance", "heldout")
"""What is told beside the first arm; the rest is shown as it is."""


@dataclass
class Gain:
    """An arm of a comparison beside the first one.

    Attributes:
        of: the data and the width that the comparison's arms share, for people.
        budget: such as "60 seconds".
        metric: key of what was measured.
        tokens, hidden, unmasked: of the arm's masking.
        ratio: `values` seed by seed, `mean`, `interval`.
    """

    comparison: str
    of: str
    budget: str
    arm: str
    metric: str
    tokens: int
    hidden: float
    route: str | None
    unmasked: float
    ratio: dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A `compare.json`. Raises UsageError for another file."""
    files.require_regular(path)
    with files.reading(path, "a comparison's result in JSON"):
        found = json.loads(path.read_text(encoding="utf-8"))
    try:
        complete = {"spec", "metrics", "by", "seeds", "arms"} <= set(found)
        complete &= all({"measured", "masking"} <= set(arm) for arm in found["arms"].values())
    except (TypeError, KeyError, AttributeError):
        complete = False
    if not complete:
        raise UsageError(f"{path} is no compare.json: give the result files of comparisons")
    return found


def gains(results: dict[str, dict[str, Any]]) -> list[Gain]:
    """Every arm but the first of every comparison, by every metric."""
    found = []
    for comparison, result in results.items():
        first, *others = result["arms"]
        for name in others:
            arm, base = result["arms"][name], result["arms"][first]
            for metric in COMPARED:
                if metric not in arm["measured"] or metric not in base["measured"]:
                    continue
                pairs = zip(
                    arm["measured"][metric]["values"],
                    base["measured"][metric]["values"],
                    strict=True,
                )
                found.append(
                    Gain(
                        comparison=comparison,
                        of=_of(result),
                        budget=budget_of(result),
                        arm=name,
                        metric=metric,
                        ratio=summed_up([a / b for a, b in pairs]),
                        **arm["masking"],
                    )
                )
    return found


def _of(result: dict[str, Any]) -> str:
    """Comparisons of the same data and width make one plot."""
    common = result["spec"].get("common", {})
    data, model = common.get("data", {}), common.get("model", {})
    known = [data.get("source")]
    known += [f"{data['image_size']} px"] if "image_size" in data else []
    known += [f"width {model['hidden_size']}"] if "hidden_size" in model else []
    return ", ".join(part for part in known if part)


def budget_of(result: dict[str, Any]) -> str:
    """The budget of every arm and seed, for people."""
    kind, value = next((k, v) for k, v in result["spec"]["budget"].items() if v is not None)
    if kind == "flops":
        return f"{value / 1e12:,.4g} TFLOP"
    return f"{value:,} {kind}" if kind == "images" else f"{value:,.6g} {kind}"


# ------------------------------------------------------------------ the table


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """A section with a table for every comparison."""
    found = gains(results)
    parts = []
    for name, result in results.items():
        metrics = {m: t for m, t in result["metrics"].items() if _first(result, m)}
        tokens = next(iter(result["arms"].values()))["masking"]["tokens"]
        seeds = len(result["seeds"])
        head = (
            f"### {name}\n\n{tokens} tokens, {budget_of(result)} for every arm and seed, "
            f"{seeds} seed{'s' if seeds > 1 else ''}, {result['device']}; the slowest tenth of "
            f"turns took {result['unsteady']:.0%} longer than the median one.\n"
        )
        columns = ["arm", "hidden", "unmasked at the end", "images", "TFLOP", "seconds"]
        for metric, title in metrics.items():
            columns += [title, "beside the first arm"] if metric in COMPARED else [title]
        rows = [
            [
                arm,
                *_cost(content),
                *[
                    cell
                    for metric in metrics
                    for cell in _measured(content, _gain(found, name, arm, metric), metric)
                ],
            ]
            for arm, content in result["arms"].items()
        ]
        parts.append(head + "\n" + _table(columns, rows))
    return "\n".join(parts)


def _first(result: dict[str, Any], metric: str) -> bool:
    return metric in next(iter(result["arms"].values()))["measured"]


def _gain(found: list[Gain], comparison: str, arm: str, metric: str) -> Gain | None:
    wanted = (comparison, arm, metric)
    return next((g for g in found if (g.comparison, g.arm, g.metric) == wanted), None)


def _cost(arm: dict[str, Any]) -> list[str]:
    masking = arm["masking"]
    return [
        f"{masking['hidden']:.0%}",
        f"{masking['unmasked']:.0%}",
        f"{arm['images']:,}",
        f"{tera:,.0f}" if (tera := arm["flops"] / 1e12) >= 100 else f"{tera:.3g}",
        f"{arm['seconds']:.1f}",
    ]


def _measured(arm: dict[str, Any], gain: Gain | None, metric: str) -> list[str]:
    measured = arm["measured"][metric]
    points = " ".join(f"{value:.4g}" for value in measured["values"])
    shown = f"{measured['mean']:.4g}"
    if len(measured["values"]) > 1:
        shown += f" ({points})"
    if metric not in COMPARED:
        return [shown]
    if gain is None:
        return [shown, "1"]
    ratio = f"{gain.ratio['mean']:.3f}"
    if gain.ratio["interval"] is not None:
        low, high = gain.ratio["interval"]
        ratio += f" ({low:.3f} to {high:.3f})"
    return [shown, ratio]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# ------------------------------------------------------------------ the pictures


def draw_crossover(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Ratios over the number of tokens: a panel for every metric and kind of budget, a line for
    every arm that there is at several numbers of tokens.
    """
    found = gains(results)
    _draw(
        found,
        results,
        path,
        lines=lambda gain: gain.arm,
        x=lambda gain: float(gain.tokens),
        title="tokens of an image",
        logarithmic=True,
    )


def draw_tails(results: dict[str, dict[str, Any]], path: Path) -> bool:
    """Ratios over the share of images that are seen unmasked at the end: a line for every number of
    tokens, route and ratio of which there are three lengths or more. False where there are none.
    """
    kinds: dict[Any, set[float]] = {}
    for gain in gains(results):
        if gain.route is not None:
            kinds.setdefault(_kind(gain), set()).add(gain.unmasked)
    tried = {kind for kind, lengths in kinds.items() if len(lengths) > 2}
    found = [gain for gain in gains(results) if _kind(gain) in tried]
    if found:
        _draw(
            found,
            results,
            path,
            lines=lambda gain: f"{gain.route} {gain.hidden:.0%}, {gain.tokens} tokens",
            x=lambda gain: gain.unmasked,
            title="share of the images that are seen unmasked, at the end",
            logarithmic=False,
        )
    return bool(found)


def _kind(gain: Gain) -> Any:
    return gain.comparison, gain.route, round(gain.hidden, 3), gain.tokens, gain.metric


def _draw(
    found: list[Gain],
    results: dict[str, dict[str, Any]],
    path: Path,
    *,
    lines: Any,
    x: Any,
    title: str,
    logarithmic: bool,
) -> None:
    from matplotlib.figure import Figure

    titles = {m: t for result in results.values() for m, t in result["metrics"].items()}
    panels = sorted({_panel(gain) for gain in found})
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = list(dict.fromkeys(map(lines, found)))
    for axis, panel in zip(axes, panels, strict=False):
        here = [gain for gain in found if _panel(gain) == panel]
        of, budget, metric = panel
        for number, name in enumerate(names):
            own = sorted((g for g in here if lines(g) == name), key=x)
            if not own:
                continue
            colour = f"C{number % 10}"
            axis.plot([x(g) for g in own], [g.ratio["mean"] for g in own], color=colour, label=name)
            for gain in own:
                values = gain.ratio["values"]
                axis.plot([x(gain)] * len(values), values, "o", markersize=4, color=colour)
        axis.axhline(1.0, color="grey", linestyle=":")
        axis.set(xlabel=title, ylabel=f"{titles[metric]}\nbeside the first arm's")
        axis.set_title(f"{of}\nequal {budget}" if of else f"equal {budget}", fontsize=9)
        if logarithmic:
            ticks = sorted({x(gain) for gain in here})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure_files.save(figure, path, 120, DRAWN_BY)


def _panel(gain: Gain) -> tuple[str, str, str]:
    return gain.of, gain.budget.split()[-1], gain.metric


WRITTEN = ("summary.md", "crossover.png", "tails.png")
DRAWN_BY = "msmdiff compare"


def require_target(out: Path, overwrite: bool = False) -> None:
    """Refuse, before costly work, to replace files in a folder that `write` did not write.

    Raises UsageError.
    """
    for name in WRITTEN:
        files.require_ours(out / name, _is_ours(out / name), overwrite)


def _is_ours(path: Path) -> bool:
    if path.suffix == ".png":
        return figure_files.ours(path, DRAWN_BY)
    try:
        text = files.read_text(path)
    except MsmdiffError:
        return False
    return text.startswith("### ") and " for every arm and seed, " in text


def write(results: dict[str, dict[str, Any]], out: Path) -> list[Path]:
    """`summary.md`, `crossover.png` and `tails.png`, those of WRITTEN that there is something for;
    replaces what is there, see `require_target`.
    """
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    text, crossover, tails = (out / name for name in WRITTEN)
    with files.atomic(text) as part:
        part.write_text(markdown(results), encoding="utf-8")
    made = [text]
    if gains(results):
        draw_crossover(results, crossover)
        made.append(crossover)
        if draw_tails(results, tails):
            made.append(tails)
    return made
