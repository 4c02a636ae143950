"""`weights ema`: averages of any width from a run's snapshots, and their quality over widths."""

from pathlib import Path
from typing import Annotated, Any

import typer

from msmdiff.core.errors import UsageError


def register(group: typer.Typer) -> None:
    """Add the command to the group of `weights`."""
    group.command(
        epilog="Examples: `msmdiff weights ema runs/mine --width 0.1 -o mine.safetensors` · "
        "`msmdiff weights ema mine --widths 0.02,0.05,0.1,0.2 --data digits:test`"
    )(ema)


def ema(
    run: Annotated[
        str, typer.Argument(help="A run with snapshots (ema.snapshots_every), or its name.")
    ],
    width: Annotated[
        float | None,
        typer.Option(help="Write the average of this relative width, above 0 and up to 0.28."),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(help="Measure averages of these widths, such as 0.02,0.05,0.1,0.2."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With --widths: the images or statistics to compare with.")
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=2, help="With --widths: samples of each average; default 500.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="With --widths: what images are compared by, as `fid` takes it; pixel."),
    ] = None,
    weights_file: Annotated[
        Path | None, typer.Option("--weights", help="The weights file of the features.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(help="Where in the training, in images seen; by default the last snapshot."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The weights file to write, or with --widths the picture (PNG)."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --widths: how samples are drawn, `sample.steps=20`."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that msmdiff did not write.")
    ] = False,
) -> None:
    """Make averages (EMA) of any width from a run's snapshots, after the training."""
    from msmdiff.core.training import posthoc

    if (width is None) == (widths is None):
        raise UsageError("give --width W to write an average, or --widths A,B,C to measure several")
    place = posthoc.run_of(run)
    judging = {"--data": data, "--n": n, "--features": features, "--weights": weights_file}
    if width is not None:
        _refuse_idle({**judging, "--set": sets})
        target = out or Path(f"{place.name}-{width:g}.safetensors")
        _write(place, width, images, target, overwrite)
        return
    if data is None:
        raise UsageError("--widths needs images to compare with: --data digits:test, or a folder")
    from msmdiff.core import config as configuration
    from msmdiff.core.compare.widths import Settings
    from msmdiff.core.training import launch

    how = Settings(
        reference=data,
        n=n or 500,
        features=features or "pixel",
        weights=weights_file,
        layers=[configuration.parse_sets(sets or [])],
        device=launch.process()[0],
    )
    _measure(place, _numbers(widths or ""), images, how, out or place / "widths.png", overwrite)


def _refuse_idle(given: dict[str, Any]) -> None:
    """Raises UsageError for an option that does nothing where one average is written."""
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} has no effect with --width: leave it out, or use --widths")


def _write(run: Path, width: float, images: int | None, target: Path, overwrite: bool) -> None:
    from msmdiff.cli.console import Console
    from msmdiff.core import files, weights
    from msmdiff.core.training import posthoc

    files.require_ours(target, target.is_file() and weights.is_ours(target), overwrite)
    made = posthoc.combine(run, width, images)
    weights.save(target, made.tensors, made.config, **made.notes)
    Console().note(
        f"{target}: the average of width {width:g} at image {made.images:,}, from {made.used} "
        f"snapshots; its profile is off by {made.error:.2%}"
    )


def _measure(
    run: Path, widths: list[float], images: int | None, how: Any, picture: Path, overwrite: bool
) -> None:
    from msmdiff.cli.console import Console
    from msmdiff.core import figure_files, files
    from msmdiff.core.compare import widths as averages

    files.require_ours(picture, figure_files.ours(picture), overwrite)
    files.require_writable(picture)
    console = Console()

    def tell(judged: Any) -> None:
        console.note(f"width {judged.width:g}: {judged.distance:.4g}")

    judged, title = averages.curve(run, widths, how, images, tell)
    best = min(judged, key=lambda each: each.distance)
    rows = [
        (f"{each.width:g}", f"{each.distance:.4g}", f"{each.error:.2%}", "*" * (each is best))
        for each in judged
    ]
    header = ("width", title, "profile off by", "best")
    console.table(f"averages of {run}, {how.n} samples each, {how.reference}", header, rows)
    figure_files.save(averages.draw(judged, title), picture, dpi=120)
    console.note(f"picture: {picture}")


def _numbers(text: str) -> list[float]:
    """`0.02,0.05` -> numbers. Raises UsageError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--widths {text}: give numbers such as 0.02,0.05,0.1") from None
