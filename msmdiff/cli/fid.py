"""`fid`: the distance between two sets of images, and what else tells them apart."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from msmdiff.core.errors import MsmdiffError, UsageError

SetA = Annotated[
    str | None, typer.Argument(help="A folder, a zip, an `.npz`, or a run or weights to draw from.")
]
SetB = Annotated[str | None, typer.Argument(help="The reference, or an `.npz` of statistics.")]
Metrics = Annotated[
    str, typer.Option(help="What to compute, such as fid,kid,prdc. See `list metrics`.")
]
Features = Annotated[
    str,
    typer.Option(
        help="What images are compared by: inception, dinov2, pixel (8x8 averages, not FID), or "
        "a classifier's file, which `data features` makes."
    ),
]
Weights = Annotated[
    Path | None, typer.Option(help="The features' weights; by default cached or downloaded.")
]
Dinov2Weights = Annotated[Path | None, typer.Option(help="DINOv2's weights, for fd_dinov2.")]
Resize = Annotated[
    str | None,
    typer.Option(
        help="Whose rule brings images to Inception's size: pytorch-fid, clean or adm; by default "
        "the given statistics', else pytorch-fid."
    ),
]
Crop = Annotated[
    int | None, typer.Option(min=8, help="Crop images to this side first, as training does.")
]
N = Annotated[
    int | None,
    typer.Option(
        min=2,
        max=10_000_000,
        help="How many images are drawn; by default 10,000.",
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Set a key of metric, features or data; if images are drawn, also of sample, codec "
        "or model.",
    ),
]
Run = Annotated[
    Path | None, typer.Option(help="Measure this run, against the argument or its data.")
]
EveryCheckpoint = Annotated[
    bool,
    typer.Option("--every-checkpoint", help="Measure each checkpoint of --run."),
]
Bootstrap = Annotated[
    int,
    typer.Option(min=0, max=10_000, help="Bootstrap resamples for a 95 % interval; 0 means none."),
]
Plot = Annotated[Path | None, typer.Option(help="A PNG of samples beside the nearest references.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-mismatch", help="Compare although the settings differ.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per network pass.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="Inception's precision.")]
Workers = Annotated[
    int | None, typer.Option(min=0, help="Decoding processes; by default as many as help.")
]
SaveStats = Annotated[
    Path | None,
    typer.Option("--save-stats", "-o", "--out", help="Write the statistics of the last set given."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the scores with all settings; - writes to stdout."),
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace outputs that msmdiff did not write.")
]


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
    a: SetA = None,
    b: SetB = None,
    metrics: Metrics = "fid",
    features: Features = "inception",
    weights: Weights = None,
    dinov2_weights: Dinov2Weights = None,
    resize: Resize = None,
    crop: Crop = None,
    n: N = None,
    sets: Sets = None,
    run: Run = None,
    every_checkpoint: EveryCheckpoint = False,
    bootstrap: Bootstrap = 0,
    plot: Plot = None,
    allow_mismatch: AllowMismatch = False,
    batch_size: BatchSize = 16,
    precision: Precision = "fp32",
    workers: Workers = None,
    save_stats: SaveStats = None,
    json_file: JsonFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare two sets of images: FID, sFID, Inception Score, KID, precision/recall,
    density/coverage, FD-DINOv2.

    `msmdiff fid stats SRC -o FILE` keeps the statistics of a reference. The images of one set must
    have one size.
    """
    from msmdiff.core.metrics.evaluate import Settings
    from msmdiff.core.metrics.features import named

    features, weights = named(features, weights)
    outputs = _Outputs(save_stats, json_file, plot)
    outputs.check(overwrite)
    chosen = _split_sets(sets)
    if resize is not None:
        chosen.features["resize"] = resize
    if precision != "fp32":
        chosen.features["precision"] = precision
    wish = _Wish(a=a, b=b, run=run, crop=crop, every_checkpoint=every_checkpoint)
    sides = _sides(wish, save_stats)
    _refuse_checkpoints(wish, metrics.split(","), plot)
    _refuse_idle_drawing(sides, n, chosen)
    settings = Settings(
        metrics=metrics.split(","),
        features=features,
        weights=weights,
        dinov2_weights=dinov2_weights,
        feature_options=chosen.features,
        metric_options=chosen.metric,
        allow_mismatch=allow_mismatch,
        batch_size=batch_size,
        bootstrap=bootstrap,
        keep_rows=plot is not None,
    )
    opening = {"n": n or 10_000, "crop": sides.crop, "workers": workers, "layers": [chosen.layers]}
    _compare(sides, settings, opening, outputs)


def _refuse_checkpoints(wish: Any, metrics: list[str], plot: Path | None) -> None:
    """Raises UsageError for --every-checkpoint beside what it does not go with."""
    if wish.every_checkpoint and (wish.run is None or plot is not None or "fid" not in metrics):
        raise UsageError(
            "--every-checkpoint goes with --run RUN and a fid among the --metrics, and not with "
            "--plot"
        )


@dataclass
class _Outputs:
    """The files to write, where they are wanted; `-` as the JSON is standard output."""

    statistics: Path | None
    json: Path | None
    plot: Path | None

    def check(self, overwrite: bool) -> None:
        """Refuse what cannot or must not be written, before anything is measured.

        Raises UsageError for a file that this tool did not write, and MsmdiffError for a place that
        cannot be written.
        """
        from msmdiff.core import files
        from msmdiff.core.metrics import sheet, statistics

        wanted: list[tuple[Path | None, Callable[[Path], bool]]] = [
            (self.statistics, statistics.ours),
            (None if str(self.json) == "-" else self.json, _is_record),
            (self.plot, sheet.ours),
        ]
        for path, ours in wanted:
            if path is None:
                continue
            files.require_writable(path)
            files.require_ours(path, os.path.lexists(path) and ours(path), overwrite)


def _is_record(path: Path) -> bool:
    """Whether `--json` wrote a file."""
    from msmdiff.core import files

    try:
        files.require_regular(path)
        with files.reading(path, "JSON"):
            content = json.loads(path.read_text(encoding="utf-8"))
    except MsmdiffError:
        return False
    return isinstance(content, dict) and {"settings", "measured", "versions"} <= set(content)


def _compare(
    sides: "_Sides",
    settings: Any,
    opening: dict[str, Any],
    outputs: _Outputs,
) -> None:
    """Measure, show, and write statistics, JSON and a picture where they are wanted."""
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core.files import write_json
    from msmdiff.core.metrics import evaluate, sheet, statistics
    from msmdiff.core.training import launch

    save_stats, json_file, plot = outputs.statistics, outputs.json, outputs.plot
    settings.device, main = launch.process()
    console = Console(to_stderr=str(json_file) == "-")
    if main:
        settings.note = console.note
        settings.progress = lambda done, total: console.progress(done, total, {})
    results, sets, passes = evaluate.evaluate(sides.samples, sides.reference, settings, **opening)
    launch.leave()
    if not main:
        return
    if save_stats is not None:
        statistics.save(save_stats, passes[0].sets[-1])
        count, name = passes[0].sets[-1].count, passes[0].features.name
        console.note(f"statistics of {count:,} images, {name}, in {save_stats}")
    _show(console, sides, results, passes)
    if sides.images_seen:
        _show_curve(sides, results, console.note)
    opening.pop("layers")
    content = _record(
        sides=sides,
        results=results,
        sets=sets,
        passes=passes,
        settings={**_told(settings), **opening},
    )
    if json_file is not None and str(json_file) == "-":
        print_json(content)
    elif json_file is not None:
        write_json(json_file, content)
    if plot is not None and results:
        sheet.save(path=plot, a=sets[0], b=sets[-1], each=passes[0], scores=results[0])
        console.note(f"nearest references in {plot}")


@dataclass
class _Wish:
    """What the user named."""

    a: str | None
    b: str | None
    run: Path | None
    crop: int | None
    every_checkpoint: bool


@dataclass
class _Sides:
    """The sets to measure, the reference, and of a run's checkpoints the images seen by each."""

    samples: list[str]
    reference: str | None
    crop: int | None
    run: Path | None = None
    images_seen: list[int] = field(default_factory=list)


def _sides(wish: _Wish, save_stats: Path | None) -> _Sides:
    """Which sets are compared. Raises UsageError where that is not said."""
    from msmdiff.core.training import evaluation

    a, b = wish.a, wish.b
    if a == "stats" and b is not None and not Path(a).exists():
        if save_stats is None:
            raise UsageError(f"fid stats {b} needs a file to write: -o reference.npz")
        a, b = b, None
    sides = _Sides([a] if a is not None else [], b, wish.crop)
    if wish.run is not None:
        if b is not None:
            raise UsageError(
                f"--run {wish.run} is one side of the comparison: give the other alone, not {a} "
                f"and {b}"
            )
        path, found, reference, crop = evaluation.open_run(wish.run, a, wish.crop)
        sides = _Sides([str(path)], reference, crop, path)
        if wish.every_checkpoint:
            sides.samples, sides.images_seen = [str(p) for p in found.values()], [*found]
        if not sides.samples:
            raise UsageError(f"--run {path} has no whole checkpoint to measure")
    if not sides.samples or (sides.reference is None and save_stats is None):
        raise UsageError(
            "fid compares two sets: give A and B, or `stats SRC -o FILE` to keep the statistics of "
            "one"
        )
    return sides


@dataclass
class _Chosen:
    """What `--set` says of metrics, of the feature network, of sources, and of drawing, with the
    flags of the last.
    """

    metric: dict[str, Any]
    features: dict[str, Any]
    layers: dict[str, Any]
    flags: list[str]
    source_options: list[str]


def _split_sets(sets: list[str] | None) -> _Chosen:
    from msmdiff.core import config as configuration
    from msmdiff.core.sections import DataConfig

    layers = configuration.parse_sets(sets or [])
    metric, features = layers.pop("metric", {}), layers.pop("features", {})
    options = [key for key in layers.get("data", {}) if key not in DataConfig.model_fields]
    of_images = {f"data.{key}" for key in ("float_range", *options)}
    drawing = [pair for pair in sets or [] if pair.partition("=")[0].strip() not in of_images]
    flags = [f"--set {pair}" for pair in drawing if pair.partition(".")[0].strip() in layers]
    return _Chosen(metric, features, layers, flags, options)


def _refuse_idle_drawing(sides: _Sides, n: int | None, chosen: _Chosen) -> None:
    from msmdiff.core.data import sources
    from msmdiff.core.metrics import inputs

    drawing = [f"--n {n}"] if n is not None else []
    drawing += chosen.flags
    specs = [spec for spec in (*sides.samples, sides.reference) if spec is not None]
    for key in chosen.source_options:
        if not any(sources.takes(spec, key) for spec in specs if not inputs.draws(spec)):
            takers = ", ".join(sources.takers_of(key)) or "no source at all"
            raise UsageError(
                f"--set data.{key} has no effect on {' and '.join(specs)}, only on {takers}"
            )
    if drawing and not any(inputs.draws(spec) for spec in specs):
        raise UsageError(f"{' '.join(drawing)}: nothing is drawn, for no side is a run or weights")


def _show(console: Any, sides: _Sides, results: list[Any], passes: list[Any]) -> None:
    """A table for each set, what was measured how, and a warning of few images."""
    from msmdiff.core.metrics.evaluate import BIASED_BELOW

    for spec, scores in zip(sides.samples, results, strict=False):
        first = scores[0]
        counts = [
            f"{n:,} images" if n else "unknown number" for n in (first.count_a, first.count_b)
        ]
        rows = [(s.title, f"{s.value:z.4f}", _spread(s), s.features) for s in scores]
        title = f"{spec} ({counts[0]}) against {sides.reference} ({counts[1]})"
        console.table(title, ("metric", "value", "", "features"), rows)
    for each in passes:
        known = []
        for name, value in each.sets[-1].settings.items():
            values = dict.fromkeys(s.settings.get(name, value) for s in each.sets)
            known.append(f"{name} {' against '.join(values)}")
        console.note(", ".join(known))
    counted = [s.count for s in passes[0].sets if s.count]
    smallest = min(counted, default=BIASED_BELOW)
    if results and smallest < BIASED_BELOW:
        width = passes[0].features.width
        few = f", strongly below the {width} features" if smallest <= width else ""
        console.note(
            f"note: {smallest:,} images: below {BIASED_BELOW:,} a Fréchet distance is biased "
            f"upwards{few}: compare it only with others of the same number"
        )


def _show_curve(sides: _Sides, results: list[Any], note: Callable[[str], None]) -> None:
    from msmdiff.core.training import evaluation

    assert sides.run is not None
    pairs = zip(sides.images_seen, results, strict=True)
    points = [(images, scores[0].value, True) for images, scores in pairs]
    first = results[0][0]
    stem = f"every-checkpoint-{first.name}"  # beside what training itself measured
    best = evaluation.record(sides.run, stem, first.title, points)
    note(f"{best}, curve in {sides.run}/previews/{stem}.png")


def _told(settings: Any) -> dict[str, Any]:
    """The settings as the JSON has them, with the options of every metric: those given, and the
    defaults of the others.
    """
    from msmdiff.core import registry

    names = ("metrics", "features", "allow_mismatch", "batch_size", "bootstrap")
    told = {name: getattr(settings, name) for name in names} | {"keep": settings.keep_rows}
    told |= {name: str(getattr(settings, name)) for name in ("weights", "dinov2_weights")}
    told |= {"resize": None, "precision": "fp32", **settings.feature_options}
    options: dict[str, Any] = {}
    for entry in registry.entries("metric").values():
        options |= entry.options().model_dump()
    options |= settings.metric_options
    known = {
        "is_splits": "splits",
        "is_order": "order",
        "prdc_k": "k",
        "prdc_k_density": "k_density",
    }
    return told | {known.get(name, name): value for name, value in options.items()}


def _record(
    sides: _Sides, results: list[Any], sets: list[Any], passes: list[Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """What `--json` writes."""
    import torch

    import msmdiff

    measured = []
    for spec, scores in zip(sides.samples, results, strict=False):
        content = {**asdict(scores[0]), "metric": scores[0].title}
        every = {score.name: asdict(score) for score in scores}
        measured.append({**content, "a": spec, "b": sides.reference, "scores": every})
    device = torch.device(passes[0].features.device).type
    return {
        **(measured[0] if len(measured) == 1 else {"checkpoints": measured}),
        "settings": settings,
        "sets": {s.spec: {**s.settings, **s.notes, "unreadable": s.unreadable()} for s in sets},
        "measured": [each.sets[-1].settings for each in passes],
        "device": f"{device}, {os.environ.get('WORLD_SIZE', '1')} processes",
        "versions": {"msmdiff": msmdiff.__version__, "torch": torch.__version__},
    }


def _spread(score: Any) -> str:
    if score.interval is not None:
        low, high = score.interval
        return f"95 %: {low:.4f} to {high:.4f}"
    return "" if score.deviation is None else f"± {score.deviation:.4f}"
