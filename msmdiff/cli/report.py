"""`report`: one page about one or several runs."""

from pathlib import Path
from typing import Annotated

import typer

from msmdiff.cli import completion


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff report primer` · `msmdiff report primer scratch -o both.html`"
    )(report)


def report(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Runs or their names.", autocompletion=completion.runs
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="The page; default: RUN/report.html of the first run."),
    ] = None,
    expect: Annotated[
        Path | None,
        typer.Option(
            help="Stored curves to draw behind; by default a preset's with the same settings."
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Also store the first run's curves as a JSON file, for --expect."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that msmdiff did not write.")
    ] = False,
) -> None:
    """Write one HTML page about runs: curves, held-out loss by noise level, samples over time, what
    a mask leaves, settings and what differs, the machine, checkpoints, next commands.

    The page is one file and loads nothing.
    """
    from msmdiff.cli.console import Console
    from msmdiff.core import files
    from msmdiff.core import report as page
    from msmdiff.core.report import expected

    paths = [
        Path(name) if (Path(name) / "config.yaml").is_file() else Path("runs") / name
        for name in names
    ]
    target = out or paths[0] / "report.html"
    files.require_writable(target)
    files.require_ours(target, page.ours(target), overwrite)
    behind = [] if expect is None else [expected.read(expect)]
    if store is not None:
        files.require_writable(store)
        files.require_ours(store, store.is_file() and expected.ours(store), overwrite)
        page.store(paths[0], store)
    size = page.write(paths, target, behind)
    Console().note(f"{target} ({size / 2**20:.2f} MiB): open it in a browser")
