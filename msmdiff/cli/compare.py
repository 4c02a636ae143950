"""`compare`: several trainings under one budget, in turns, with tables and plots."""

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff compare spec.yaml --out compared` · the same again after a kill "
        "goes on · `msmdiff compare few.yaml many.yaml` · `msmdiff compare results/*.json` only "
        "sums up · docs/evaluation.md has a spec"
    )(compare)


def compare(
    specs: Annotated[
        list[Path],
        typer.Argument(
            metavar="SPEC...",
            help="YAML files with arms, budget, seeds and measure (docs/evaluation.md), or the "
            "compare.json of finished comparisons, to sum up.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The folder for runs, figures and pictures; several specs get one each in it."
        ),
    ] = Path("compared"),
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train this many of the spec's seeds; more of them can follow later."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace summaries in OUT that msmdiff did not write."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """Train several settings with the same budget, and say which is better.

    The arms take turns of a few seconds, so that other work on the machine hits all alike. The
    table has the spread over seeds. Run the same command again to go on after a kill. Several
    comparisons are summed up in one table and a plot over the number of tokens.
    """
    from dataclasses import asdict

    from msmdiff.cli.console import Console, print_json
    from msmdiff.core.compare import summary
    from msmdiff.core.errors import UsageError

    console = Console(to_stderr=as_json)
    finished = [path for path in specs if path.suffix == ".json"]
    if finished and len(finished) < len(specs):
        raise UsageError("give specs (YAML) or results (compare.json), not both")
    folders = _folders(specs, out)
    sums_up = bool(finished) or len(folders) > 1
    if sums_up:
        summary.require_target(out, overwrite)
    if finished:
        results = {name: summary.read(path) for name, path in folders.items()}
    else:
        results = {}
        for name, path in folders.items():
            outcome = _run(path, out / name if len(folders) > 1 else out, seeds, console)
            results[name] = asdict(outcome)
    if sums_up:
        for path in summary.write(results, out):
            console.note(str(path))
    if as_json:
        print_json(results if len(results) > 1 else next(iter(results.values())))


def _folders(specs: list[Path], out: Path) -> dict[str, Path]:
    """Every file by the name that its comparison goes by. Raises UsageError where two share it."""
    from msmdiff.core.errors import UsageError

    found: dict[str, Path] = {}
    for path in specs:
        name = path.parent.name if path.name == "compare.json" else path.stem
        if name in found:
            raise UsageError(f"{found[name]} and {path} would both be called {name}: rename one")
        found[name] = path
    return found


def _run(path: Path, out: Path, seeds: int | None, console: Any) -> Any:
    """One comparison, to its end."""
    from msmdiff.cli.console import Notes
    from msmdiff.core.compare import Comparison
    from msmdiff.core.compare import spec as specs

    asked = specs.read(path)
    if seeds is not None:
        asked = asked.model_copy(update={"seeds": asked.seeds[:seeds]})
    comparison = Comparison(asked, out, Notes(console))
    for arm in comparison.arms:
        steps = " + ".join(f"{stage.steps:,}" for stage in arm.stages)
        console.note(f"{arm.name}: {steps} steps with each of {len(asked.seeds)} seeds")
    outcome = comparison.run()
    comparison.draw(outcome)
    _show(outcome, console)
    console.note(f"{out}/compare.json, curves.png, samples.png")
    return outcome


def _show(outcome: Any, console: Any) -> None:
    for metric, title in outcome.metrics.items():
        if all(metric in arm["measured"] for arm in outcome.arms.values()):
            told = " (decides)" if metric == outcome.by and len(outcome.metrics) > 1 else ""
            _table(outcome, metric, f"{title}{told}, lower is better", console)
    for name, ratio in outcome.speed.items():
        console.note(
            f"{name} takes {ratio['median']:.2f} steps a second for each of the first arm's "
            f"({ratio['low']:.2f} to {ratio['high']:.2f} over {ratio['pairs']} pairs of turns)"
        )
    console.note(
        f"the slowest tenth of turns took {outcome.unsteady:.0%} longer than the median turn of "
        "its arm: so unsteady was the machine"
    )


def _table(outcome: Any, metric: str, title: str, console: Any) -> None:
    rows = []
    for name, arm in outcome.arms.items():
        found = arm["measured"][metric]
        spread = found["interval"]
        shown = "-" if spread is None else f"{spread[0]:.4g} to {spread[1]:.4g}"
        rows.append(
            (
                name,
                f"{found['mean']:.4g}",
                shown,
                " ".join(f"{value:.4g}" for value in found["values"]),
                f"{arm['images']:,}",
                f"{arm['flops'] / 1e12:,.2f}",
                f"{arm['seconds']:.1f}",
            )
        )
    header = ("arm", "mean", "95 % of the mean", "seeds", "images", "TFLOP", "seconds")
    console.table(title, header, rows)
