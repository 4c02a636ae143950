"""`quickstart`: the whole story on real digits, on a CPU, in minutes, with pictures."""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

SAMPLES = 500
"""Images per arm and seed for the distance."""

PICTURES = ("samples.png", "scratch.png", "masked.png", "curves.png")

PRETRAINING_SHARE = 1 / 6
"""Of an arm's seconds: what the masked arm spends on its primer, whose loss is flat after some
seconds of it.
"""

SEEDS = 3
"""Of each arm; a quickstart of less than three minutes has time for one only."""

ARMS = {"masked": "masked + fine-tuned", "scratch": "from scratch"}
"""Folder of an arm -> what the table calls it."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff quickstart` · `msmdiff quickstart --minutes 20 --out demo`"
    )(quickstart)


def quickstart(
    minutes: Annotated[
        float, typer.Option(min=0.5, help="How long everything may take, on a quiet machine.")
    ] = (6.0),
    out: Annotated[Path, typer.Option(help="The folder for the runs and pictures.")] = Path(
        "quickstart"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Remove what an earlier quickstart left there.")
    ] = False,
) -> None:
    """Show the whole story on real digits: pretrain on a tenth of the tokens, fine-tune, sample.

    Beside it, the same network is trained from scratch for the same seconds, in turns. Four fifths
    of scikit-learn's 1,797 digits are trained on, and one fifth is measured against. From three
    minutes on, each arm is trained with three seeds. After a kill the same command goes on.
    """
    from msmdiff.cli.console import Console, Notes
    from msmdiff.core.compare import Comparison
    from msmdiff.core.errors import UsageError
    from msmdiff.core.files import require_ours, write_json

    started = time.perf_counter()
    if fresh:
        _remove_results(out)
    if (out / "quickstart.json").is_file():
        raise UsageError(
            f"{out} holds a finished quickstart: see its pictures, or give --fresh or another --out"
        )
    console = Console()
    # What is not training: imports, set-up and timing, and the samples of both arms per seed.
    seeds = SEEDS if minutes >= 3 else 1
    arm_seconds = max(2.0, (minutes * 60 - 25 - 40 * seeds) / seeds / len(ARMS))
    console.note(
        f"two arms of {arm_seconds:.0f} s training each, in turns, with {seeds} "
        f"seed{'s' if seeds > 1 else ''}, in {out}/"
    )
    if not _is_ours(out):
        for name in PICTURES:
            require_ours(out / name, ours=False)
    comparison = Comparison(_spec(arm_seconds, seeds), out, Notes(console))
    outcome = comparison.run()
    floor = _floor()
    _show(outcome, floor, console)
    _draw(comparison, outcome, floor, out)
    story = {
        "arm_seconds": arm_seconds,
        "real_train_to_held_out": floor,
        "arms": outcome.arms,
        "speed": outcome.speed,
        "unsteady": outcome.unsteady,
    }
    write_json(out / "quickstart.json", story)
    seconds = time.perf_counter() - started
    console.note(f"pictures: {out}/{', '.join(PICTURES)} ({seconds:.0f} s)")
    console.note(
        f"next: msmdiff sample {_run(out, 'masked', 2)} --cfg 2, or msmdiff pretrain --data "
        "YOUR_IMAGES --dry-run"
    )


def _spec(seconds: float, seeds: int) -> Any:
    """Both arms: a primer that is fine-tuned, and the same network without one. The arm from
    scratch comes first, so that speeds are told beside it.
    """
    from msmdiff.core.compare.spec import Spec

    full = {"config": "digits-finetune"}
    masked = [
        {"config": "digits-pretrain", "share": PRETRAINING_SHARE},
        {**full, "share": 1 - PRETRAINING_SHARE},
    ]
    content = {
        "arms": {"scratch": full, "masked": masked},
        "common": {"data": {"source": "digits:train"}, "train": {"log_every": 20}},
        "budget": {"seconds": seconds},
        "seeds": list(range(seeds)),
        "measure": {"points": 1, "n": SAMPLES},
    }
    return Spec.model_validate(content)


def _run(out: Path, arm: str, stage: int, seed: int = 0) -> Path:
    return out / arm / f"seed-{seed}" / f"stage-{stage}"


def _remove_results(out: Path) -> None:
    """Only what a quickstart writes: the folder may hold other things."""
    if not _is_ours(out):
        return
    for arm, stages in (("scratch", 1), ("masked", 2)):
        for seed in range(SEEDS):
            for stage in range(1, stages + 1):
                run = _run(out, arm, stage, seed)
                if (run / "run.json").is_file():
                    shutil.rmtree(run)
            folder = out / arm / f"seed-{seed}"
            (folder / "measured.jsonl").unlink(missing_ok=True)
            _remove_empty(folder)
        _remove_empty(out / arm)
    # Last the plan, by which what is left after a kill is known.
    for name in (*PICTURES, "quickstart.json", "compare.json", "turns.jsonl", "plan.json"):
        (out / name).unlink(missing_ok=True)


def _is_ours(out: Path) -> bool:
    """Whether a quickstart began in this folder."""
    return any((out / name).is_file() for name in ("plan.json", "quickstart.json"))


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _floor() -> float:
    """What the real training digits score against the held-out ones: no model should be expected to
    do better.
    """
    from msmdiff.core import config as configuration
    from msmdiff.core import presets
    from msmdiff.core.data.loader import TrainingImages
    from msmdiff.core.data.sources import open_source
    from msmdiff.core.metrics import evaluate, scores
    from msmdiff.core.metrics.features import PixelFeatures

    data, features = configuration.build(presets.read("digits-finetune")).data, PixelFeatures()
    sources = [open_source(part) for part in ("digits:train", "digits:test")]
    a, b = (
        evaluate.of_images(TrainingImages(source, data, seed=0).sample(len(source)), features)
        for source in sources
    )
    return scores.compare(a, b, features).value


def _show(outcome: Any, floor: float, console: Any) -> None:
    rows = []
    for name, title in ARMS.items():
        arm = outcome.arms[name]
        spread = arm["interval"]
        shown = "" if spread is None else f" ({spread[0]:.2f} to {spread[1]:.2f})"
        rows.append(
            (
                title,
                f"{arm['images']:,}",
                f"{arm['seconds']:.1f}",
                " ".join(f"{value:.2f}" for value in arm["values"]),
                f"{arm['mean']:.2f}{shown}",
            )
        )
    rows.append(("real training digits", "-", "-", "-", f"{floor:.2f}"))
    header = ("arm", "images seen", "seconds", "seeds", "mean (95 %)")
    console.table(
        f"Pixel Fréchet distance of {SAMPLES} samples to the held-out digits (lower is better; not "
        "FID)",
        header,
        rows,
    )
    ratio = outcome.speed.get("masked")
    if ratio is not None:
        console.note(
            f"a masked step is {ratio['median']:.1f} times as fast as a full one "
            f"({ratio['low']:.1f} to {ratio['high']:.1f}, over {ratio['pairs']} pairs of turns)"
        )
    console.note(
        f"the slowest tenth of turns took {outcome.unsteady:.0%} longer than the median one"
    )


def _draw(comparison: Any, outcome: Any, floor: float, out: Path) -> None:
    """The pictures: both arms' samples, what the masked network saw, and the curves."""
    import torch

    from msmdiff.core import build as road
    from msmdiff.core import weights
    from msmdiff.core.data.images import grid
    from msmdiff.core.data.loader import TrainingImages
    from msmdiff.core.data.sources import open_source
    from msmdiff.core.training import previews

    for name, arm, stage in (("samples.png", "masked", 2), ("scratch.png", "scratch", 1)):
        model = weights.load(_run(out, arm, stage) / "weights.safetensors")
        images = torch.cat(
            [
                batch.images
                for batch in model.batches(range(100), model.condition.deal(None, range(100)))
            ]
        )
        grid(previews.to_hwc(images), columns=10).save(out / name)
    primer = weights.load(_run(out, "masked", 1) / "weights.safetensors")
    held_out = next(TrainingImages(open_source("digits:test"), primer.config.data, 0).sample(10))
    *_, route_of = road.build(primer.config).objective.passes.values()
    previews.masked_view(primer, route_of, held_out).save(out / "masked.png")
    _draw_curves(outcome, floor, out)


def _draw_curves(outcome: Any, floor: float, out: Path) -> None:
    """Losses over an arm's seconds, and the distances of all seeds."""
    from matplotlib.figure import Figure

    from msmdiff.core.training.run import Run

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    chains = {
        "masked": [("masked primer", "tab:orange"), ("fine-tuned", "tab:green")],
        "scratch": [("from scratch", "tab:blue")],
    }
    for arm, stages in chains.items():
        for seed in outcome.arms[arm]["curves"]:
            spent = 0.0
            for number, (label, colour) in enumerate(stages, start=1):
                lines = Run(_run(out, arm, number, seed), writes=False).metrics()
                x = [spent + line["seconds"] for line in lines]
                y = [line["loss"] for line in lines]
                shown = label if seed == 0 else None
                left.plot(x, y, color=colour, label=shown, linewidth=1)
                spent = x[-1]
    left.set(xlabel="training seconds of the arm", ylabel="loss", yscale="log")
    left.legend(frameon=False)
    for place, (arm, colour) in enumerate((("masked", "tab:green"), ("scratch", "tab:blue"))):
        values = outcome.arms[arm]["values"]
        right.bar(place, sum(values) / len(values), color=colour, width=0.6)
        right.plot([place] * len(values), values, "k.", markersize=4)
    right.axhline(floor, color="grey", linestyle=":", label="real digits")
    right.set(
        xticks=range(2),
        xticklabels=["masked +\nfine-tuned", "from\nscratch"],
        ylabel="pixel Fréchet distance",
    )
    right.set_ylim(top=1.25 * right.get_ylim()[1])  # room for the legend
    right.legend(frameon=False)
    figure.savefig(out / "curves.png", dpi=150)
