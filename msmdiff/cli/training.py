"""`pretrain`, `finetune`, `train`: three verbs over one trainer."""

import dataclasses
import hashlib
import inspect
import json
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from msmdiff.core.layers import SECTIONS


def _key(name: str, more: str = "", *declarations: str) -> Any:
    """An option of a configuration's key: its help is the key's own description."""
    section, _, key = name.partition(".")
    about = SECTIONS[section].model_fields[key].description or ""
    return typer.Option(*declarations, help=about[:1].upper() + about[1:] + more)


def _training_options(
    config: Annotated[
        str | None, typer.Option(help="A preset's name (`list presets`) or a YAML file.")
    ] = None,
    data: Annotated[str | None, _key("data.source")] = None,
    image_size: Annotated[int | None, _key("data.image_size")] = None,
    codec: Annotated[str | None, _key("codec.name", " (`list codecs`)")] = None,
    mask: Annotated[float | None, _key("mask.ratio")] = None,
    mask_kind: Annotated[str | None, _key("mask.kind", " (`list masks`)")] = None,
    mask_block: Annotated[
        int | None, typer.Option(help="Side of a block, in tokens, with --mask-kind block.")
    ] = None,
    mask_tail: Annotated[float | None, _key("mask.tail")] = None,
    model: Annotated[str | None, _key("model.name", " (`list models`)")] = None,
    conditional: Annotated[
        bool | None,
        typer.Option("--conditional/--unconditional", help="Learn the data's classes, or none."),
    ] = None,
    steps: Annotated[int | None, _key("train.steps")] = None,
    images: Annotated[int | None, typer.Option(help="Images to see, instead of --steps.")] = None,
    batch_size: Annotated[int | None, _key("train.batch_size")] = None,
    seed: Annotated[int | None, _key("train.seed")] = None,
    run: Annotated[
        str | None, typer.Option(help="Name under runs/, or a path. The same command resumes it.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other key: `--set optim.lr=1e-4` (`list keys`)."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the configuration and its cost; stop.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with a JSON summary on stdout.")
    ] = False,
) -> None:
    """The options that every training verb has."""


def _with_training_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the shared options: it receives them as `**options`."""
    own = [p for p in inspect.signature(verb).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = list(inspect.signature(_training_options).parameters.values())
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own + shared]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return verb


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


@_with_training_options
def pretrain(**options: Any) -> None:
    """Masked score matching: learn a primer distribution from the visible tokens only.

    Without further options it trains the tiny network on the embedded digits, 90 % hidden.
    """
    masked = {"objective": {"name": "msm"}, "mask": {"ratio": 0.9}}
    _train("pretrain", options, _configure(_with_preset(options, "digits-pretrain"), masked))


@_with_training_options
def finetune(
    ckpt: Annotated[
        str, typer.Option(help="A run, its name, or a weights file to start from (its EMA).")
    ],
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Start even if little of it fits.")
    ] = False,
    **options: Any,
) -> None:
    """Start from weights and train on, by default without a mask, with the network and the settings
    they were trained with; but for as long as asked, at a rate and precision chosen anew.

    Image size, classes and codec may change: positions are interpolated, classes matched by name,
    new parts start fresh; all of it is named.
    """
    from msmdiff.cli.weights import model_fields
    from msmdiff.core import weights
    from msmdiff.core.errors import UsageError
    from msmdiff.core.training import warmstart
    from msmdiff.core.weights import published

    try:
        path = str(weights.locate(ckpt))
    except UsageError:
        # A run that goes on needs the weights it started from no more.
        if (stored := _begun_from(ckpt, options["run"])) is None:
            raise
        path = str(stored.train.init_from)
    else:
        told = [item for item in options["sets"] or [] if item.startswith("model.")]
        hints = {k: v for k, v in model_fields(told).items() if k in published.UNTOLD}
        stored = weights.read(Path(path), hints=hints).config
    changes: dict[str, Any] = {
        "mask": {
            "ratio": 0.0,
            "kind": "patch",
            "route": "auto",
            "schedule": "constant",
            "tail": 0.0,
        },
        "objective": {"name": "dsm"},
        "train": {"init_from": path},
    }
    config = _configure(options, warmstart.next_stage(stored), changes)
    _measure_anew(config, stored)
    _train("finetune", options, config, allow_partial)


@_with_training_options
def train(**options: Any) -> None:
    """Train from scratch on all tokens (or with whatever objective the configuration names).

    Without --config, --data and --model it takes the preset digits-finetune.
    """
    _train("train", options, _configure(_with_preset(options, "digits-finetune")))


def _begun_from(ckpt: str, run: str | None) -> Any:
    """The configuration of a run that was begun from the weights once called `ckpt`, else None."""
    from msmdiff.core.training.run import Run

    begun = Run(_place(run), writes=False).begun() if run else None
    names = [(folder / ckpt).absolute() for folder in (Path(), Path("runs"))]
    places = [*names, *(name / "weights.safetensors" for name in names)]
    if begun is None or begun.train.init_from is None:
        return None
    return begun if Path(begun.train.init_from).absolute() in places else None


def _place(run: str) -> Path:
    """The directory that `--run` means: a path, or a name under runs/."""
    path = Path(run)
    return path if len(path.parts) > 1 or path.is_absolute() else Path("runs") / path


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


def _with_preset(options: dict[str, Any], name: str) -> dict[str, Any]:
    """The bare command takes the preset that suits what it trains: the tiny network on the embedded
    digits.
    """
    bare = not (options["config"] or options["data"] or options["model"])
    return {**options, "config": name} if bare else options


def _train(verb: str, options: dict[str, Any], config: Any, allow_partial: bool = False) -> None:
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import presets

    if options["dry_run"]:
        _show_plan(config, options["as_json"])
        return
    path = _place(options["run"] or _default_name(verb, config))

    from msmdiff.core.training.trainer import train as fit

    console = Console(to_stderr=options["as_json"])
    try:
        summary = fit(
            config, path, console, allow_partial=allow_partial, command=shlex.join(sys.argv)
        )
    finally:
        console.finish()
    if summary.interrupted:
        if summary.writes:
            console.note(_interrupted(summary))
        raise typer.Exit(128 + signal.Signals(summary.interrupted))
    if not summary.writes:
        return
    console.note(
        f"{path}: {summary.images_seen:,} images in {summary.steps:,} steps, "
        f"{summary.seconds:.1f} s; "
        f"next: msmdiff {'finetune --ckpt' if verb == 'pretrain' else 'sample'} {path}"
    )
    if summary.remark:
        console.note(summary.remark)
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


def _configure(options: dict[str, Any], *defaults: dict[str, Any]) -> Any:
    """Defaults < preset < named flags < --set."""
    from msmdiff.core import config as configuration
    from msmdiff.core.diffusion import masking
    from msmdiff.core.errors import UsageError

    classes = {None: None, True: "auto", False: 0}[options["conditional"]]
    flags = {
        "data.source": options["data"],
        "data.image_size": options["image_size"],
        "codec.name": options["codec"],
        "mask.ratio": options["mask"],
        # A mask asks for a masked objective, whichever suits the network, unless --set says
        # otherwise.
        "objective.name": None if options["mask"] is None else "auto",
        "mask.kind": options["mask_kind"],
        "mask.block": options["mask_block"],
        "mask.tail": options["mask_tail"],
        "model.name": options["model"],
        "model.num_classes": classes,
        "train.steps": options["steps"],
        "train.batch_size": options["batch_size"],
        "train.seed": options["seed"],
    }
    preset = [_read_preset(options["config"])] if options["config"] else []
    sets = configuration.parse_sets(options["sets"] or [])
    config = configuration.build(*defaults, *preset, configuration.nest(flags), sets)
    for option in ("mask_kind", "mask_block"):
        if options[option] is not None and not masking.hides(config.mask):
            flag = "--" + option.replace("_", "-")
            raise UsageError(
                f"{flag} {options[option]} has no effect without a mask: give --mask RATIO too"
            )
    if options["images"] is not None:
        if options["steps"] is not None:
            raise UsageError(
                f"--images {options['images']} and --steps {options['steps']} say the same "
                "thing: give one"
            )
        config.train.steps = max(1, -(-options["images"] // config.train.batch_size))
    return config


def _read_preset(name: str) -> dict[str, Any]:
    """A preset or a YAML file; a run's own config.yaml is read as runs are."""
    from msmdiff.core import config as configuration
    from msmdiff.core import presets

    content = presets.read(name)
    if Path(name).is_file() and (Path(name).parent / "run.json").is_file():
        return configuration.stored(content, name)
    return content


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
    from msmdiff.core import build as road
    from msmdiff.core import config as configuration
    from msmdiff.core.errors import MsmdiffError
    from msmdiff.core.training.run import Run

    try:
        begun = Run(run, writes=False).stored_config()
        if begun is None:
            return False
        resolved = road.resolve(config, int(begun.model.num_classes))
    except MsmdiffError:
        return False
    changes = configuration.difference(begun, resolved).values()
    return all(new in (None, "auto") for _, new in changes)


def _show_plan(config: Any, as_json: bool) -> None:
    """What `--dry-run` prints: the resolved configuration and what a step costs."""
    import os

    import torch

    from msmdiff.cli.console import print_json
    from msmdiff.core import build as road
    from msmdiff.core.data import sources
    from msmdiff.core.training import cost, launch, memory, sharding

    source = sources.open_configured(config.data)
    config = road.resolve(config, source.num_classes)
    source.check(config)
    cuda = torch.cuda.is_available()
    chosen = launch.choose_precision(config, "cuda" if cuda else "cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    counted = cost.measure(config)
    steps = config.model_copy(
        update={"train": config.train.model_copy(update={"precision": chosen})}
    )
    taken = memory.estimate(steps, processes, sharding.asked())
    if as_json:
        print_json(
            {
                "config": config.as_dict(),
                "images": len(source),
                **dataclasses.asdict(counted),
                "step_flops": counted.step_flops,
                "memory": taken.as_dict(),
            }
        )
        return
    typer.echo(config.to_yaml().rstrip())
    classes = {None: "labels in the files", 0: "no labels"}.get(
        source.num_classes, f"{source.num_classes} classes"
    )
    typer.echo(
        f"\n# data            {len(source):,} images, {classes}"
        f"\n# parameters      {counted.parameters:,}"
        f"\n# tokens          {counted.kept} of {counted.tokens} seen, "
        f"{1 - counted.kept / counted.tokens:.2%} hidden"
        f"\n# per step        {_step_cost(counted, config.train.batch_size)}"
        f"\n# memory          about {taken.total / 2**30:.2f} GiB per process: {_parts(taken)}"
    )
    for line in road.notes(config):
        typer.echo(f"# note            {line}")


def _step_cost(counted: Any, batch_size: int) -> str:
    """A step's operations as it is, with all its passes and copies, beside one plain pass."""
    step = batch_size * counted.step_flops / 1e9
    plain = 3 * batch_size * counted.forward_flops / 1e9
    shown = f"{step:,.2f} GFLOP with the mask"
    if counted.copies > 1:
        shown += f" ({counted.copies} copies of each image)"
    if counted.two_passes:
        shown = f"{step:,.2f} GFLOP in two passes, plain and masked"
    return f"{shown}, {plain:,.2f} without ({step / plain:.1%})"


def _parts(taken: Any) -> str:
    """What an estimate of memory is made of, the largest first, in GiB."""
    sizes = {name: size for name, size in taken.as_dict().items() if size and name != "total"}
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)
    return ", ".join(f"{name} {sizes[name] / 2**30:.2f}" for name in largest)
