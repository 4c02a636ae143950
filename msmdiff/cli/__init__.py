"""The command line: parse, call core, show. Heavy imports happen inside the commands, so that
`--help` is instant.
"""

import os
import sys

import typer

from msmdiff import __version__
from msmdiff.cli import (
    answers,
    bench,
    compare,
    console,
    data,
    fid,
    listing,
    plugins,
    quickstart,
    report,
    runs,
    sample,
    training,
    weights,
)

app = typer.Typer(
    name="msmdiff",
    help="Train diffusion transformers cheaply by masking, draw samples, and measure them.",
    epilog="Start with `msmdiff quickstart`, or `msmdiff pretrain --mask 0.9`.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"msmdiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


for _module in (
    training,
    sample,
    fid,
    runs,
    report,
    listing,
    data,
    weights,
    bench,
    compare,
    quickstart,
):
    _module.register(app)
plugins.accept(app)
answers.give(app)


def main() -> None:
    """Run the command line; every failure ends in one sentence and an exit code."""
    console.heed_the_second_interrupt()
    try:
        with console.sentences():
            app()
    except SystemExit as left:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _leave_at_once(left)
        raise


def _leave_at_once(left: SystemExit) -> None:
    """End one of several processes without tearing torch down: threads of its collectives may
    still be there then, and abort a process that has finished its work.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    code = left.code if isinstance(left.code, int) else int(left.code is not None)
    os._exit(code)
