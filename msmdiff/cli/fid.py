"""`fid`: the distance between two sets of images, and what else tells them apart."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SETTINGS = (
    "metrics",
    "features",
    "weights",
    "dinov2_weights",
    "resize",
    "precision",
    "crop",
    "n",
    "allow_mismatch",
)
SETTINGS += ("batch_size", "workers", "bootstrap", "keep")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff fid samples/faces celeba/` · `msmdiff fid samples.npz "
        "VIRTUAL_imagenet256.npz "
        "--metrics fid,sfid,is,prdc` · `msmdiff fid a/ b.zip --features pixel` · `msmdiff fid "
        "stats celeba/ --crop 64 "
        "-o celeba.npz` · `msmdiff fid runs/faces celeba.npz --n 50000` · `msmdiff fid --run "
        "faces --every-checkpoint`"
    )(fid)


def fid(
    a: Annotated[
        str | None, typer.Argument(help="Folder, zip, `.npz`, or a run or weights to sample from.")
    ] = None,
    b: Annotated[
        str | None, typer.Argument(help="The reference; also an `.npz` of statistics.")
    ] = None,
    metrics: Annotated[str, typer.Option(help="Of fid,sfid,is,kid,prdc,fd_dinov2.")] = "fid",
    features: Annotated[
        Literal["inception", "dinov2", "pixel"],
        typer.Option(help="pixel: 8x8 area averages, for tiny images; not FID."),
    ] = "inception",
    weights: Annotated[
        Path | None, typer.Option(help="The features' weights, if in no cache.")
    ] = None,
    dinov2_weights: Annotated[
        Path | None, typer.Option(help="Those of fd_dinov2 beside Inception.")
    ] = None,
    resize: Annotated[
        Literal["pytorch-fid", "clean", "adm"] | None,
        typer.Option(
            help="Inception's resizing rule; default: the given statistics', else pytorch-fid."
        ),
    ] = None,
    crop: Annotated[
        int | None,
        typer.Option(min=8, help="Centre-crop images to this side first, as training does."),
    ] = None,
    n: Annotated[
        int | None, typer.Option(min=2, help="Images to draw, seeds from 0; default: 10,000.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Of sample, codec or model, when drawing.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Measure a run; reference: the argument, else its data.")
    ] = None,
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="All of --run's, with a curve.")
    ] = False,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Draw both sets anew so often, for a 95 % interval.")
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="PNG: samples beside their nearest references.")
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare what was measured unalike.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 16,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of Inception.")] = "fp32",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Decoding processes; default: as many as help.")
    ] = None,
    save_stats: Annotated[
        Path | None,
        typer.Option(
            "--save-stats", "-o", "--out", help="Write the statistics of the last set given."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write scores and settings; - for stdout.")
    ] = None,
) -> None:
    """Compare two sets of images: FID, sFID, Inception Score, KID, precision/recall,
    density/coverage, FD-DINOv2.

    `msmdiff fid stats SRC -o FILE` keeps a reference's statistics. Images of one set must have one
    size.
    """
    asked = {**locals(), "metrics": metrics.split(","), "keep": plot is not None, "n": n or 10_000}
    from dataclasses import asdict

    import torch

    import msmdiff
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import config as configuration
    from msmdiff.core.data.sources import holds_images
    from msmdiff.core.errors import UsageError
    from msmdiff.core.files import write_json
    from msmdiff.core.metrics import evaluate, inputs, sheet, statistics
    from msmdiff.core.training import evaluation, launch

    if a == "stats" and b is not None and not Path(a).exists():
        if save_stats is None:
            raise UsageError(f"fid stats {b} needs a file to write: -o reference.npz")
        a, b = b, None
    samples, images_seen = [a] if a is not None else [], []
    if run is not None:
        if b is not None:
            raise UsageError(
                f"--run {run} is one side of the comparison: give the other alone, not {a} and {b}"
            )
        run, found, b, asked["crop"] = evaluation.open_run(run, a, crop)
        samples, images_seen = (
            ([str(p) for p in found.values()], [*found]) if every_checkpoint else ([str(run)], [])
        )
        if not samples:
            raise UsageError(f"--run {run} has no whole checkpoint to measure")
    if every_checkpoint and (run is None or plot is not None or "fid" not in asked["metrics"]):
        raise UsageError(
            "--every-checkpoint goes with --run RUN and a fid among the --metrics, and "
            "not with --plot"
        )
    if not samples or (b is None and save_stats is None):
        raise UsageError(
            "fid compares two sets: give A and B, or `stats SRC -o FILE` to keep the "
            "statistics of one"
        )
    if (
        save_stats
        and save_stats.exists()
        and (not statistics.load(save_stats) or holds_images(save_stats))
    ):
        raise UsageError(
            f"{save_stats} holds other things than statistics: give another name, or remove it"
        )
    drawing = [f"--n {n}"] * (n is not None) + [f"--set {pair}" for pair in sets or []]
    if drawing and not any(inputs.draws(spec) for spec in (*samples, b) if spec is not None):
        raise UsageError(f"{' '.join(drawing)}: nothing is drawn, for no side is a run or weights")
    device, main = launch.process()
    console = Console(to_stderr=str(json_file) == "-")
    settings = {name: asked[name] for name in SETTINGS}
    note = console.note if main else lambda text: None
    results, sides, passes = evaluate.evaluate(
        samples,
        b,
        **settings,
        layers=[configuration.parse_sets(sets or [])],
        device=device,
        note=note,
        progress=lambda done, total: console.progress(done, total, {}) if main else None,
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    first = passes[0]
    if not main:
        return
    if save_stats is not None:
        statistics.save(save_stats, first.sets[-1])
        note(
            f"statistics of {first.sets[-1].count:,} images, {first.features.name}, in {save_stats}"
        )
    for spec, scores in zip(samples, results, strict=False):
        counts = [
            f"{n:,} images" if n else "unknown number"
            for n in (scores[0].count_a, scores[0].count_b)
        ]
        rows = [(s.title, f"{s.value:.4f}", _spread(s), s.features) for s in scores]
        console.table(
            f"{spec} ({counts[0]}) against {b} ({counts[1]})",
            ("metric", "value", "", "features"),
            rows,
        )
    for each in passes:
        known = [
            (k, dict.fromkeys(s.settings.get(k, v) for s in each.sets))
            for k, v in each.sets[-1].settings.items()
        ]
        note(", ".join(f"{name} {' against '.join(values)}" for name, values in known))
    smallest = min((s.count for s in first.sets if s.count), default=evaluate.BIASED_BELOW)
    if results and smallest < evaluate.BIASED_BELOW:
        few = (
            f", strongly below the {first.features.width} features"
            if smallest <= first.features.width
            else ""
        )
        note(
            f"note: {smallest:,} images: below {evaluate.BIASED_BELOW:,} a Fréchet distance is "
            f"biased upwards{few}: "
            "compare it only with others of the same number"
        )
    if images_seen and run is not None:
        points = [
            (i, scores[0].value, True) for i, scores in zip(images_seen, results, strict=True)
        ]
        stem = f"every-checkpoint-{results[0][0].name}"  # beside what training itself measured
        note(
            f"{evaluation.record(run, stem, results[0][0].title, points)}, curve in "
            f"{run}/previews/{stem}.png"
        )
    measured = [{**asdict(s[0]), "metric": s[0].title, "a": x, "b": b, "scores": {i.name: asdict(i) for i in s}}
                for x, s in zip(samples, results, strict=False)]  # fmt: skip
    content = {
        **(measured[0] if len(measured) == 1 else {"checkpoints": measured}),
        "settings": {
            **settings,
            **evaluate.PAPERS,
            "weights": str(weights),
            "dinov2_weights": str(dinov2_weights),
        },
        "sets": {s.spec: {**s.settings, **s.notes, "unreadable": s.unreadable()} for s in sides},
        "measured": [each.sets[-1].settings for each in passes],
        "device": f"{device.type}, {os.environ.get('WORLD_SIZE', '1')} processes",
        "versions": {"msmdiff": msmdiff.__version__, "torch": torch.__version__},
    }
    if json_file is not None and str(json_file) == "-":
        print_json(content)
    elif json_file is not None:
        write_json(json_file, content)
    if plot is not None and results:
        sheet.save(plot, sides[0], sides[-1], first, results[0])
        note(f"nearest references in {plot}")


def _spread(score: Any) -> str:
    if score.interval is not None:
        return "95 %: {:.4f} to {:.4f}".format(*score.interval)
    return "" if score.deviation is None else f"± {score.deviation:.4f}"
