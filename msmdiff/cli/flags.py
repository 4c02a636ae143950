"""The options that the training verbs share, and how they become a configuration."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from msmdiff.cli import completion
from msmdiff.core.errors import UsageError
from msmdiff.core.layers import SECTIONS, merge


def _key(name: str, more: str = "", completion: Any = None) -> Any:
    """An option of a configuration's key: its help is the key's own description."""
    section, _, key = name.partition(".")
    about = SECTIONS[section].model_fields[key].description or ""
    return typer.Option(help=about + more, autocompletion=completion)


def _training_options(
    config: Annotated[
        str | None,
        typer.Option(
            help="A preset (see `list presets`) or a YAML file.", autocompletion=completion.presets
        ),
    ] = None,
    data: Annotated[str | None, _key("data.source")] = None,
    image_size: Annotated[int | None, _key("data.image_size")] = None,
    codec: Annotated[str | None, _key("codec.name", " See `list codecs`.")] = None,
    mask: Annotated[float | None, _key("mask.ratio")] = None,
    mask_kind: Annotated[str | None, _key("mask.kind", " See `list masks`.")] = None,
    mask_block: Annotated[
        int | None, typer.Option(help="The side of a block in tokens, with --mask-kind block.")
    ] = None,
    mask_tail: Annotated[float | None, _key("mask.tail")] = None,
    model: Annotated[
        str | None, _key("model.name", " See `list models`.", completion.registered("size"))
    ] = None,
    conditional: Annotated[
        bool | None,
        typer.Option(
            "--conditional/--unconditional", help="Learn the data's classes, or no classes."
        ),
    ] = None,
    steps: Annotated[int | None, _key("train.steps")] = None,
    images: Annotated[
        int | None, typer.Option(help="How many images to see, instead of --steps.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="How many times to see every image, instead of --steps.")
    ] = None,
    batch_size: Annotated[int | None, _key("train.batch_size")] = None,
    lr: Annotated[float | None, _key("optim.lr")] = None,
    seed: Annotated[int | None, _key("train.seed")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="The device: cpu, cuda or cuda:N; by default a GPU if there is one."),
    ] = None,
    run: Annotated[
        str | None,
        typer.Option(
            help="A name under runs/, or a path. A run that is there goes on, with its own "
            "settings unless others are given.",
            autocompletion=completion.runs,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with this run, which must be there.", autocompletion=completion.runs
        ),
    ] = None,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="Go on although the rate, the precision or the like changed; the run records it.",
        ),
    ] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set any other key: `--set optim.lr=1e-4`. See `list keys`."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the configuration and what it costs, and stop.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only errors and where the result is.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with a JSON summary on stdout.")
    ] = False,
) -> None:
    """The options that every training verb has."""


def with_training_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the shared options: it receives them as `**options`."""
    own = [p for p in inspect.signature(verb).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = list(inspect.signature(_training_options).parameters.values())
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own + shared]
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return verb


def place(run: str) -> Path:
    """The directory that `--run` means: a path, `.` and `..` among them, or a name under runs/."""
    is_name = Path(run).name == run and run != ".."
    return Path("runs") / run if is_name else Path(run)


def begun(options: dict[str, Any]) -> Any:
    """The configuration of the run that goes on, or None where a new one begins.

    Raises UsageError for a run to resume that is not there, or two names.
    """
    from msmdiff.core.training.run import Run

    run, resume = options["run"], options["resume"]
    if resume is not None and run not in (None, resume):
        raise UsageError(f"--run {run} and --resume {resume} name two runs: give one")
    options["run"] = run = run or resume
    found = Run(place(run), writes=False).begun() if run else None
    if resume is not None and found is None:
        raise UsageError(
            f"--resume {resume}: there is no checkpoint in {place(resume)}; `msmdiff runs` shows "
            "the runs there are, --run begins a new one"
        )
    return found


def configure(options: dict[str, Any], *defaults: dict[str, Any], goes_on: Any = None) -> Any:
    """Defaults < what suits the data < preset < named flags < --set.

    A run that goes on (its configuration in `goes_on`) takes its own settings in place of all that
    is not given now; a preset that is given stands for itself.
    """
    from msmdiff.core import config as configuration

    flags = configuration.nest(_named(options))
    sets = configuration.parse_sets(options["sets"] or [])
    under = list(defaults)
    if options["config"]:
        under.append(configuration.preset(options["config"]))
    elif goes_on is not None:
        under = [configuration.stored(goes_on.as_dict(), "the run")]
    elif options["chooses"]:
        given = merge(flags, sets)
        under.append(_chosen(given, options["tell"], plans=options["dry_run"]))
    config = configuration.build(*under, flags, sets)
    _refuse_idle_masks(options, config)
    _set_length(options, config)
    return config


def _named(options: dict[str, Any]) -> dict[str, Any]:
    """The named flags as keys of the configuration."""
    return {
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
        "model.num_classes": {None: None, True: "auto", False: 0}[options["conditional"]],
        "train.steps": options["steps"],
        "train.batch_size": options["batch_size"],
        "train.seed": options["seed"],
        "optim.lr": options["lr"],
    }


def _chosen(given: dict[str, Any], tell: Callable[[str], None], plans: bool) -> dict[str, Any]:
    """What suits the user's own data, where it is not given; a plan needs no data."""
    from msmdiff.core import config as configuration
    from msmdiff.core.data import sources
    from msmdiff.core.training import defaults

    data = configuration.section("data", **(given.get("data") or {}))
    if plans and not sources.is_data(data.source):
        tell(f"{data.source} is not here: {defaults.ASSUMED:,} images are taken for granted")
        facts = defaults.facts_of_none()
    else:
        facts = defaults.facts_of(sources.open_configured(data))
    choice = defaults.choose(given, facts)
    tell(choice.reason)
    return choice.layer


def _refuse_idle_masks(options: dict[str, Any], config: Any) -> None:
    from msmdiff.core.diffusion import masking

    for option in ("mask_kind", "mask_block"):
        if options[option] is not None and not masking.hides(config.mask):
            flag = "--" + option.replace("_", "-")
            raise UsageError(
                f"{flag} {options[option]} has no effect without a mask: give --mask RATIO too"
            )


def _set_length(options: dict[str, Any], config: Any) -> None:
    """--images and --epochs in steps. Raises UsageError where the length is said twice."""
    from msmdiff.core.data import sources

    said = [name for name in ("steps", "images", "epochs") if options[name] is not None]
    if len(said) > 1:
        first, second = said[:2]
        raise UsageError(
            f"--{second} {options[second]} and --{first} {options[first]} say the same thing: "
            "give one"
        )
    images = options["images"]
    if options["epochs"] is not None:
        if not options["epochs"] > 0:
            raise UsageError(f"--epochs {options['epochs']:g}: give a number above 0")
        images = round(options["epochs"] * len(sources.open_configured(config.data)))
    if images is not None:
        config.train.steps = max(1, -(-images // config.train.batch_size))
