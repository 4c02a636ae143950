"""`fid`: the distance between two sets of images."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff fid samples/faces celeba/` · `msmdiff fid samples.npz reference.npz` · "
        "`msmdiff fid a/ b.zip --features pixel` · `msmdiff fid celeba/ --save-stats celeba.npz`"
    )(fid)


def fid(
    a: Annotated[str, typer.Argument(help="Folder, zip, `.npz` of images or of statistics.")],
    b: Annotated[
        str | None, typer.Argument(help="The reference, likewise. Without it, --save-stats is needed.")
    ] = None,
    features: Annotated[
        Literal["inception", "pixel"], typer.Option(help="pixel: 8x8 area averages, for tiny images; not FID.")
    ] = "inception",
    weights: Annotated[Path | None, typer.Option(help="Inception weights, if not in torch hub's cache.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 16,
    save_stats: Annotated[Path | None, typer.Option(help="Write the statistics of the last set given.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the score and its settings; - for stdout.")
    ] = None,
) -> None:
    """Fréchet distance between two sets of images: FID, or the pixel distance.

    Statistics are gathered in float64, batch by batch. Images of one set must have one size.
    """
    import torch

    from msmdiff.cli.console import Console, print_json, write_json
    from msmdiff.core.errors import UsageError
    from msmdiff.core.metrics import evaluate, statistics
    from msmdiff.core.metrics.features import FEATURES

    if b is None and save_stats is None:
        raise UsageError("fid compares two sets: give B as well, or --save-stats FILE to keep the statistics of A")
    to_stdout = json_file is not None and str(json_file) == "-"
    console = Console(to_stderr=to_stdout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = FEATURES[features](weights, device)
    sets = []
    for spec in [a] if b is None else [a, b]:
        sets.append(
            evaluate.of_source(spec, extractor, batch_size, lambda done, total: console.progress(done, total, {}))
        )
        console.finish()
    if save_stats is not None:
        statistics.save(save_stats, sets[-1])
        console.note(f"statistics of {sets[-1].count:,} images, {extractor.name}, in {save_stats}")
    if b is None:
        return
    score = evaluate.compare(sets[0], sets[1], extractor)
    counts = [f"{s.count:,}" if s.count else "unknown" for s in sets]
    console.note(f"{score.title}: {score.value:.4f}  ({counts[0]} against {counts[1]} images, {score.features})")
    smallest = min((s.count for s in sets if s.count), default=0)
    if 0 < smallest <= extractor.width:
        console.note(
            f"note: {smallest:,} images are too few for {extractor.width} features: the distance is biased upwards"
        )
    result = {
        "metric": score.title,
        "value": score.value,
        "features": score.features,
        "a": a,
        "b": b,
        "count_a": score.count_a,
        "count_b": score.count_b,
    }
    if to_stdout:
        print_json(result)
    elif json_file is not None:
        write_json(json_file, result)
