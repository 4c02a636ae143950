"""`pretrain`, `finetune`, `train`: three verbs over one trainer."""

import hashlib
import json
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from msmdiff.cli import completion
from msmdiff.cli.flags import begun, configure, place, with_training_options
from msmdiff.core.errors import UsageError
from msmdiff.core.layers import all_tokens


def register(app: typer.Typer) -> None:
    """Add the three verbs."""
    app.command(
        epilog="Examples: `msmdiff pretrain --mask 0.9` · "
        "`msmdiff pretrain --data celeba/ --image-size 64 --model MaskDM-S/4 --mask 0.9 "
        "--mask-kind block` · "
        "`msmdiff pretrain --codec dwt --mask 0.5 --dry-run`"
    )(pretrain)
    app.command(
        epilog="Examples: `msmdiff finetune --ckpt runs/primer` · "
        "`msmdiff finetune --ckpt primer --conditional --steps 5000` · "
        "`msmdiff finetune --ckpt weights.safetensors --data faces.zip --image-size 128`"
    )(finetune)
    app.command(
        epilog="Examples: `msmdiff train --conditional` · "
        "`msmdiff train --config digits-finetune` · `torchrun --nproc_per_node 2 -m -- msmdiff "
        "train --data photos/`"
    )(train)


@with_training_options
def pretrain(**options: Any) -> None:
    """Train on the visible tokens only (masked score matching), which gives a primer to fine-tune.

    Without options it trains a tiny network on the embedded digits, with 90 % of the tokens hidden.
    """
    _begin(options)
    masked = {"objective": {"name": "msm"}, "mask": {"ratio": 0.9}}
    goes_on = begun(options)
    _with_preset(options, "digits-pretrain", goes_on)
    _train("pretrain", options, configure(options, masked, goes_on=goes_on))


@with_training_options
def finetune(
    ckpt: Annotated[
        str | None,
        typer.Option(
            help="The run or weights file to start from; its average (EMA) is taken. A run that "
            "goes on knows it.",
            autocompletion=completion.runs,
        ),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Start even if little of it fits.")
    ] = False,
    **options: Any,
) -> None:
    """Start from weights and train on, without a mask unless --mask asks for one.

    The network and its settings stay; how long it trains, the rate and the precision are chosen
    anew. Image size, classes and codec may change: positions are interpolated, classes are matched
    by name, and new parts start fresh. The start of the run says so.
    """
    from msmdiff.cli.weights import model_fields
    from msmdiff.core import weights
    from msmdiff.core.training import warmstart
    from msmdiff.core.weights import published

    _begin(options)
    goes_on = begun(options)
    if goes_on is not None and goes_on.train.init_from is None:
        goes_on = None  # another training's run: its differences are told
    options["chooses"] = False
    if goes_on is not None and not options["config"]:
        config = configure(options, goes_on=goes_on)
        config.train.init_from = _start_of(ckpt, goes_on)
        _train("finetune", options, config, allow_partial)
        return
    if ckpt is None:
        raise UsageError("finetune needs --ckpt: a run, its name, or a weights file to start from")
    path = _start_of(ckpt, goes_on)
    if Path(path).exists():
        told = [item for item in options["sets"] or [] if item.startswith("model.")]
        hints = {k: v for k, v in model_fields(told).items() if k in published.UNTOLD}
        read = weights.read(Path(path), hints=hints)
        stored = read.config
        if "layout" in read.notes and options["data"] is None:
            options["tell"](f"no --data: it is fine-tuned on {stored.data.source}")
    else:
        stored = goes_on  # a run that goes on needs the weights it started from no more
    changes = {**all_tokens(stored.objective.name), "train": {"init_from": path}}
    config = configure(options, warmstart.next_stage(stored), changes)
    _measure_anew(config, stored)
    _train("finetune", options, config, allow_partial)


@with_training_options
def train(**options: Any) -> None:
    """Train from scratch on all tokens, or as the configuration says.

    Without --config, --data and --model it takes the preset digits-finetune.
    """
    _begin(options)
    goes_on = begun(options)
    _with_preset(options, "digits-finetune", goes_on)
    _train("train", options, configure(options, goes_on=goes_on))


def _begin(options: dict[str, Any]) -> None:
    """Choose the device, before torch looks for one, and where messages go."""
    from msmdiff.cli.console import Console
    from msmdiff.core import machine

    machine.use(options["device"])
    options["console"] = Console(to_stderr=options["as_json"], quiet=options["quiet"])
    options["tell"] = options["console"].note


def _with_preset(options: dict[str, Any], name: str, goes_on: Any) -> None:
    """The bare command takes the preset that suits what it trains: the tiny network on the embedded
    digits. The user's own data without a preset gets what suits them.
    """
    from msmdiff.core.training import defaults

    data = options["data"]
    sourced = any(item.startswith("data.source=") for item in options["sets"] or [])
    bare = not (options["config"] or data or options["model"] or sourced)
    options["chooses"] = sourced if data is None else defaults.chosen_for(data)
    if bare and goes_on is None:
        options["config"] = name


def _start_of(ckpt: str | None, goes_on: Any) -> str:
    """The weights that `--ckpt` names, or, of a run that goes on, those that it started from, which
    may be gone.
    """
    from msmdiff.core import weights

    started = str(goes_on.train.init_from) if goes_on is not None else None
    if ckpt is None and started is not None:
        return started
    try:
        return str(weights.locate(str(ckpt)))
    except UsageError:
        names = [(folder / str(ckpt)).absolute() for folder in (Path(), Path("runs"))]
        places = [*names, *(name / "weights.safetensors" for name in names)]
        if started is None or Path(started).absolute() not in places:
            raise
        return started


def _measure_anew(config: Any, stored: Any) -> None:
    """What was measured of the data for another space is measured again for this one."""
    from msmdiff.core import registry

    measures = registry.find("codec", config.codec.name, "codec.name").make.measures
    unmeasured = dict.fromkeys(measures)
    before, now = stored.codec.model_dump(), config.codec.model_dump()
    same_values = all(now[name] == before.get(name) for name in measures)
    if same_values and {**now, **unmeasured} != {**before, **unmeasured}:
        for name in measures:
            setattr(config.codec, name, None)


def _train(verb: str, options: dict[str, Any], config: Any, allow_partial: bool = False) -> None:
    from msmdiff.cli import plan
    from msmdiff.cli.console import print_json
    from msmdiff.core import presets

    if options["dry_run"]:
        plan.show(config, options["as_json"])
        return
    path = place(options["run"] or _default_name(verb, config))

    from msmdiff.core.training.trainer import train as fit

    console = options["console"]
    try:
        summary = fit(
            config,
            path,
            console,
            allow_partial=allow_partial,
            allow_change=options["allow_change"],
            command=shlex.join(sys.argv),
        )
    finally:
        console.finish()
    if summary.interrupted:
        if summary.writes:
            console.result(_interrupted(summary))
        raise typer.Exit(128 + signal.Signals(summary.interrupted))
    if not summary.writes:
        return
    _tell_the_end(console, summary, verb, path)
    if options["as_json"]:
        stored = presets.parse_yaml((path / "config.yaml").read_text(), str(path))
        print_json(
            {
                "run": str(path),
                "images_seen": summary.images_seen,
                "steps": summary.steps,
                "seconds": summary.seconds,
                "config": stored,
            }
        )


def _tell_the_end(console: Any, summary: Any, verb: str, path: Path) -> None:
    """What was done, where it is, and what to do next."""
    done = f"{summary.images_seen:,} images in {summary.steps:,} steps, {summary.seconds:.1f} s"
    following = f"msmdiff {'finetune --ckpt' if verb == 'pretrain' else 'sample'} {path}"
    drawn = [name for name in ("results.png", "previews") if any((path / name).glob("*"))
             or (path / name).is_file()]  # fmt: skip
    pictures = ", ".join(f"{path}/{name}" for name in drawn)
    if console.draws:
        figures = console.figures()
        rows = [("trained", done), *figures, ("weights", f"{path}/weights.safetensors")]
        rows += [("pictures", pictures)] if drawn else []
        rows += [("note", summary.remark)] if summary.remark else []
        rows += [("next", following), ("", f"msmdiff report {path}"), ("", "msmdiff runs")]
        console.panel(f"finished {path}", rows)
        return
    console.result(f"{path}: {done}; next: {following}")
    if summary.remark:
        console.note(summary.remark)
    if drawn:
        console.note(f"pictures: {pictures}; msmdiff runs shows all runs")


def _interrupted(summary: Any) -> str:
    """What a signal left behind."""
    from msmdiff.core.training import checkpoint

    if summary.images_seen:
        return (
            f"interrupted at image {summary.images_seen:,} and saved: the same command resumes "
            f"{summary.run}"
        )
    if checkpoint.newest(summary.run):
        return f"interrupted before the first step: the same command resumes {summary.run}"
    return "interrupted before the first step: nothing was saved yet"


def _default_name(verb: str, config: Any) -> str:
    """A name that the same command finds again, and another command does not."""
    from msmdiff.core import config as configuration

    data = re.sub(r"\W+", "-", Path(config.data.source).stem)
    model = re.sub(r"\W+", "-", config.model.name or "custom")
    flat = configuration.flatten(config.as_dict())
    identity = {k: v for k, v in flat.items() if not configuration.MUTABLE.fullmatch(k)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]
    name = f"{verb}-{data}-{model}-{digest}"
    earlier = sorted(Path("runs").glob(f"{verb}-{data}-{model}-??????"))
    if not (Path("runs") / name).is_dir():  # keys that came later give another digest
        name = next((path.name for path in earlier if _is_same(path, config)), name)
    return name


def _is_same(run: Path, config: Any) -> bool:
    """Whether a run was begun with what a configuration that is not resolved yet asks for."""
    from msmdiff.core import config as configuration
    from msmdiff.core.errors import MsmdiffError
    from msmdiff.core.training import preparing
    from msmdiff.core.training.run import Run

    try:
        begun = Run(run, writes=False).stored_config()
        if begun is None:
            return False
        resolved = preparing.resolved(config, begun, int(begun.model.num_classes))
    except MsmdiffError:
        return False
    return not configuration.difference(begun, resolved)
