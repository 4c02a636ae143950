"""`compare`: several trainings under one budget, in turns, with a table and plots."""

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff compare spec.yaml --out compared` · the same again after a kill "
        "goes on · docs/recipes.md has a spec"
    )(compare)


def compare(
    spec: Annotated[
        Path, typer.Argument(help="YAML: arms, budget, seeds, measure (docs/recipes.md).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the runs, figures and pictures.")] = Path(
        "compared"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """Train several arms with the same budget, taking turns of a few seconds, and say which is
    better, with the spread over seeds.

    Run it again to go on after a kill: it ends with the same bits.
    """
    from dataclasses import asdict

    from msmdiff.cli.console import Console, Notes, print_json
    from msmdiff.core.compare import Comparison
    from msmdiff.core.compare import spec as specs

    console = Console(to_stderr=as_json)
    asked = specs.read(spec)
    comparison = Comparison(asked, out, Notes(console))
    for arm in comparison.arms:
        steps = " + ".join(f"{stage.steps:,}" for stage in arm.stages)
        console.note(f"{arm.name}: {steps} steps with each of {len(asked.seeds)} seeds")
    outcome = comparison.run()
    comparison.draw(outcome)
    if as_json:
        print_json(asdict(outcome))
        return
    _show(outcome, console)
    console.note(f"{out}/compare.json, curves.png, samples.png")


def _show(outcome: Any, console: Any) -> None:
    rows = []
    for name, arm in outcome.arms.items():
        spread = arm["interval"]
        shown = "-" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}"
        rows.append(
            (
                name,
                f"{arm['mean']:.2f}",
                shown,
                " ".join(f"{value:.2f}" for value in arm["values"]),
                f"{arm['images']:,}",
                f"{arm['flops'] / 1e12:,.2f}",
                f"{arm['seconds']:.1f}",
            )
        )
    header = ("arm", "mean", "95 % of the mean", "seeds", "images", "TFLOP", "seconds")
    console.table(f"{outcome.metric} (lower is better)", header, rows)
    for name, ratio in outcome.speed.items():
        console.note(
            f"{name} takes {ratio['median']:.2f} steps a second for each of the first arm's "
            f"({ratio['low']:.2f} to {ratio['high']:.2f} over {ratio['pairs']} pairs of turns)"
        )
    console.note(
        f"the slowest tenth of turns took {outcome.unsteady:.0%} longer than the median turn of "
        "its arm: so unsteady was the machine"
    )
