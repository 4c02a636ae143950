"""`quickstart`: the whole story on real digits, on a CPU, in minutes, with pictures."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

SAMPLES = 500
"""Images per arm for the distance."""

PRETRAINING_SHARE = 1 / 6
"""Of an arm's seconds: what the masked arm spends on its primer, whose loss is flat after some
seconds of it.
"""


@dataclass
class Stage:
    """One training: what the table says of it, and its loss over the arm's seconds."""

    name: str
    run: Path
    steps: int
    seconds: float
    images_per_s: float
    distance: float | None = None
    curve: list[tuple[float, float]] = field(default_factory=list)

    def figures(self) -> dict[str, float | int | None]:
        """For the JSON file."""
        return {
            name: getattr(self, name) for name in ("steps", "seconds", "images_per_s", "distance")
        }


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff quickstart` · `msmdiff quickstart --minutes 20 --out demo`"
    )(quickstart)


def quickstart(
    minutes: Annotated[
        float, typer.Option(min=0.5, help="For everything; from 15 on, three seeds.")
    ] = 6.0,
    out: Annotated[Path, typer.Option(help="Folder for the runs and pictures.")] = Path(
        "quickstart"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove what an earlier quickstart left there.")
    ] = False,
) -> None:
    """Pretrain on a tenth of the tokens, fine-tune, sample; and train from scratch for the same
    seconds beside it.

    Everything runs on scikit-learn's 1,797 real digits: four fifths to train on, one fifth to
    measure against.
    """
    from msmdiff.cli.console import Console
    from msmdiff.core.errors import UsageError
    from msmdiff.core.files import write_json

    started = time.perf_counter()
    if fresh:
        _remove_results(out)
    if (out / "quickstart.json").is_file():
        raise UsageError(
            f"{out} holds a finished quickstart: see its pictures, or give --fresh or another --out"
        )
    console = Console()
    seeds = 3 if minutes >= 15 else 1
    # What is not training: imports and set-up, and per seed the samples of both arms.
    arm_seconds = max(5.0, (minutes * 60 - 15 - 20 * seeds) / seeds / 2)
    console.note(
        f"two arms of {arm_seconds:.0f} s training each, {seeds} "
        f"seed{'s' if seeds > 1 else ''}, in {out}/"
    )
    results = [_both_arms(seed, arm_seconds, out / f"seed{seed}", console) for seed in range(seeds)]
    floor = _floor()
    _show(results, floor, console)
    _draw(results, floor, out)
    write_json(
        out / "quickstart.json",
        {
            "arm_seconds": arm_seconds,
            "real_train_to_held_out": floor,
            "seeds": [{stage.name: stage.figures() for stage in stages} for stages in results],
        },
    )
    console.note(
        f"pictures: {out}/samples.png, scratch.png, masked.png, curves.png "
        f"({time.perf_counter() - started:.0f} s)"
    )
    console.note(
        f"next: msmdiff sample {out}/seed0/finetuned --cfg 2, or msmdiff pretrain --data "
        "YOUR_IMAGES --dry-run"
    )


def _remove_results(out: Path) -> None:
    """Only what a quickstart writes: the folder may hold other things."""
    for seed in range(3):
        folder = out / f"seed{seed}"
        for arm in ("primer", "finetuned", "scratch"):
            if (folder / arm / "run.json").is_file():
                shutil.rmtree(folder / arm)
            (folder / f"{arm}.png").unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for name in ("samples.png", "scratch.png", "masked.png", "curves.png", "quickstart.json"):
        (out / name).unlink(missing_ok=True)


def _both_arms(seed: int, seconds: float, out: Path, console: Any) -> list[Stage]:
    primer_seconds = seconds * PRETRAINING_SHARE
    primer = _train(
        name="masked primer",
        preset="digits-pretrain",
        seed=seed,
        seconds=primer_seconds,
        run=out / "primer",
        console=console,
    )
    start = out / "primer" / "weights.safetensors"
    rest = seconds - primer_seconds
    finetuned = _train(
        name="fine-tuned",
        preset="digits-finetune",
        seed=seed,
        seconds=rest,
        run=out / "finetuned",
        console=console,
        start=start,
    )
    finetuned.curve = [(primer.seconds + x, y) for x, y in finetuned.curve]
    scratch = _train(
        name="from scratch",
        preset="digits-finetune",
        seed=seed,
        seconds=seconds,
        run=out / "scratch",
        console=console,
    )
    for stage in (finetuned, scratch):
        stage.distance = _distance(stage.run, out, seed)
    return [primer, finetuned, scratch]


def _train(
    name: str,
    preset: str,
    seed: int,
    seconds: float,
    run: Path,
    console: Any,
    start: Path | None = None,
) -> Stage:
    """Train a preset for so many seconds; the number of steps is what fits."""
    from msmdiff.core import config as configuration
    from msmdiff.core import presets
    from msmdiff.core.training.run import Run
    from msmdiff.core.training.trainer import train

    budget = {
        "data": {"source": "digits:train"},
        "train": {
            "seed": seed,
            "max_seconds": seconds,
            "steps": 10_000_000,
            "log_every": 20,
            "checkpoint_every": 1000,
            "preview_every": 0,
            "init_from": str(start) if start else None,
        },
    }
    config = configuration.build(presets.read(preset), budget)
    summary = train(config, run, _Budget(console, name, seconds), command="msmdiff quickstart")
    if summary.interrupted:
        console.note("interrupted: the same command goes on from here")
        raise typer.Exit(128 + summary.interrupted)
    lines = Run(run, writes=False).metrics()
    return Stage(
        name=name,
        run=run,
        steps=summary.steps,
        seconds=summary.seconds,
        images_per_s=summary.images_seen / summary.seconds,
        curve=[(line["seconds"], line["loss"]) for line in lines],
    )


class _Budget:
    """Shows progress in seconds: the steps are not known beforehand."""

    def __init__(self, console: Any, name: str, seconds: float) -> None:
        self._console, self._name, self._seconds = console, name, seconds
        self._shown = 0.0

    def note(self, text: str) -> None:
        self._console.note(f"[{self._name}] {text}")

    def progress(self, images_seen: int, total: int, metrics: dict[str, Any]) -> None:
        if metrics["seconds"] >= self._seconds or metrics["seconds"] - self._shown >= 10:
            self._shown = metrics["seconds"]
            self.note(
                f"{metrics['seconds']:.0f}/{self._seconds:.0f} s, step {metrics['step']:,}, "
                f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:,.0f} images/s"
            )


def _distance(run: Path, out: Path, seed: int) -> float:
    """Pixel Fréchet distance of SAMPLES images, classes in turn, to the held-out digits; keeps a
    grid of 100.
    """
    import torch

    from msmdiff.core import weights
    from msmdiff.core.data.images import grid
    from msmdiff.core.metrics import evaluate, inputs, scores
    from msmdiff.core.metrics.features import PixelFeatures
    from msmdiff.core.training.previews import to_hwc

    first = seed * SAMPLES
    drawn = inputs.Drawn("samples", weights.load(run / "weights.safetensors"), SAMPLES)
    batches = [*drawn.batches(range(first, first + SAMPLES), 125)]
    grid(to_hwc(torch.cat(batches)[:100]), columns=10).save(out / f"{run.name}.png")
    features = PixelFeatures()
    held_out = evaluate.of_images(_digits("digits:test", drawn.model.config), features)
    return scores.compare(evaluate.of_images(batches, features), held_out, features).value


def _digits(part: str, config: Any) -> Any:
    """All images of a part of the digits at the size that was trained on, as uint8 batches."""
    from msmdiff.core.data.loader import TrainingImages
    from msmdiff.core.data.sources import open_source

    source = open_source(part)
    return TrainingImages(source, config.data, seed=0).sample(len(source))


def _floor() -> float:
    """What the real training digits score against the held-out ones: no model should be expected to
    do better.
    """
    from msmdiff.core import config as configuration
    from msmdiff.core import presets
    from msmdiff.core.metrics import evaluate, scores
    from msmdiff.core.metrics.features import PixelFeatures

    config, features = configuration.build(presets.read("digits-finetune")), PixelFeatures()
    a, b = (
        evaluate.of_images(_digits(part, config), features)
        for part in ("digits:train", "digits:test")
    )
    return scores.compare(a, b, features).value


def _show(results: list[list[Stage]], floor: float, console: Any) -> None:
    rows = []
    for stages in zip(*results, strict=True):
        distances = [s.distance for s in stages if s.distance is not None]
        rows.append(
            (
                stages[0].name,
                f"{sum(s.steps for s in stages) / len(stages):,.0f}",
                f"{sum(s.seconds for s in stages) / len(stages):.1f}",
                f"{sum(s.images_per_s for s in stages) / len(stages):,.0f}",
                " ".join(f"{d:.2f}" for d in distances) or "-",
            )
        )
    rows.append(("real training digits", "-", "-", "-", f"{floor:.2f}"))
    header = ("stage", "steps", "seconds", "images/s", "pixel Fréchet distance")
    console.table(
        "Distance of 500 samples to the held-out digits (lower is better; not FID)", header, rows
    )
    primer, finetuned, scratch = results[0]
    ratio, masked = primer.images_per_s / scratch.images_per_s, primer.seconds + finetuned.seconds
    console.note(f"a masked step sees {ratio:.1f} times as many images a second as a full one")
    console.note(
        f"seconds of training: masked arm {masked:.0f}, from scratch {scratch.seconds:.0f}"
    )


def _draw(results: list[list[Stage]], floor: float, out: Path) -> None:
    """The pictures: both arms' samples, what the masked network saw, and the curves."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from msmdiff.core import build as road
    from msmdiff.core import weights
    from msmdiff.core.data.loader import TrainingImages
    from msmdiff.core.data.sources import open_source
    from msmdiff.core.training import previews

    shutil.copyfile(out / "seed0" / "finetuned.png", out / "samples.png")
    shutil.copyfile(out / "seed0" / "scratch.png", out / "scratch.png")
    primer = weights.load(out / "seed0" / "primer" / "weights.safetensors")
    images = next(TrainingImages(open_source("digits:test"), primer.config.data, 0).sample(10))
    *_, route_of = road.build(primer.config).objective.passes.values()
    view = previews.masked_view(primer, route_of, images)
    view.save(out / "masked.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 1))
    colours = {"masked primer": "tab:orange", "fine-tuned": "tab:green", "from scratch": "tab:blue"}
    for number, stages in enumerate(results):
        for stage in stages:
            label = stage.name if number == 0 else None
            left.plot(
                *zip(*stage.curve, strict=True), color=colours[stage.name], label=label, linewidth=1
            )
    left.set(xlabel="training seconds of the arm", ylabel="loss", yscale="log")
    left.legend(frameon=False)
    arms = ("fine-tuned", "from scratch")
    for x, arm in enumerate(arms):
        found = [s.distance for stages in results for s in stages if s.name == arm]
        values = [value for value in found if value is not None]
        right.bar(x, sum(values) / len(values), color=colours[arm], width=0.6)
        right.plot([x] * len(values), values, "k.", markersize=4)
    right.axhline(floor, color="grey", linestyle=":", label="real digits")
    right.set(
        xticks=range(2),
        xticklabels=["masked +\nfine-tuned", "from\nscratch"],
        ylabel="pixel Fréchet distance",
    )
    right.set_ylim(top=1.25 * right.get_ylim()[1])  # room for the legend
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)
