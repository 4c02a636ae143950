"""`runs`: every run with its progress and last figures; several in one picture."""

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff runs` · `msmdiff runs primer scratch --plot both.png` · "
        "`msmdiff runs --json`"
    )(runs)


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Runs or their names; the default is all under runs/."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw their curves into this PNG, in one picture.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that msmdiff did not write.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """List the runs: progress, last loss, held-out loss and distance, and size on the disk."""
    from dataclasses import asdict

    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import files
    from msmdiff.core.errors import UsageError
    from msmdiff.core.training import results

    if plot is not None:
        files.require_writable(plot)
        files.require_ours(plot, results.ours(plot), overwrite)
    paths = _paths(names)
    found = [(path, standing) for path in paths if (standing := results.standing(path))]
    if names and len(found) < len(names):
        known = {path for path, _ in found}
        missing = next(name for name, path in zip(names, paths, strict=True) if path not in known)
        raise UsageError(f"{missing} is no run, here or under runs/")
    found.sort(key=lambda pair: -pair[1].changed)
    if plot is not None:
        if not found:
            raise UsageError("there are no runs under runs/ to draw")
        results.compare([path for path, _ in found], plot)
    if as_json:
        print_json([{**asdict(each), "path": str(path)} for path, each in found])
        return
    console = Console()
    if not found:
        console.note("no runs yet: `msmdiff pretrain --mask 0.9` begins one under runs/")
        return
    header = ("run", "steps", "loss", "held-out", "distance", "images/s", "MiB", "written")
    console.table("runs", header, [_row(each) for _, each in found])
    console.note("losses compare only between runs with equal masks, predictions and spaces; "
                 "held-out losses in one space")  # fmt: skip
    if plot is not None:
        console.note(str(plot))


def _paths(names: list[str] | None) -> list[Path]:
    """The directories that are meant."""
    if not names:
        return sorted(path.parent for path in Path("runs").glob("*/run.json"))
    return [
        Path(name) if (Path(name) / "run.json").is_file() else Path("runs") / name for name in names
    ]


def _row(each: Any) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    distance = shown(each.distance, ".2f") + (f" {each.metric}" if each.metric else "")
    return (
        each.name,
        f"{each.steps:,}/{each.of:,}",
        shown(each.loss, ".4f"),
        shown(each.heldout, ".4f"),
        distance,
        shown(each.images_per_s, ",.0f"),
        f"{each.bytes / 2**20:,.1f}",
        each.age,
    )
