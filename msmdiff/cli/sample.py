"""`sample`: weights or a run -> PNGs, a grid, ADM's `.npz`, statistics, and pictures to look at."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from msmdiff.cli import completion
from msmdiff.core.errors import UsageError

Source = Annotated[
    list[str] | None,
    typer.Argument(
        help="Runs, their names, checkpoints or weights files; the default is the newest run.",
        autocompletion=completion.runs,
    ),
]
N = Annotated[int | None, typer.Option(help="How many images to draw, with seeds 0 to n - 1.")]
Seeds = Annotated[
    str | None,
    typer.Option(help="The seeds to draw, as A-B or one number. One seed is one image."),
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Classes that the seeds get in turn: 3, 0-9, 0,4,7, names (Flags,Objects), or "
        "balanced for all of them; random draws one for each seed, data in the data's proportions."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="A file with one prompt a line, which the seeds get in turn (text to image)."
    ),
]
Steps = Annotated[
    str | None, typer.Option(help="How many steps to take, or ADM's spacing such as ddim25.")
]
Sampler = Annotated[
    str | None,
    typer.Option(
        help="The sampler; the default is the run's, normally ddim. See `list samplers`.",
        autocompletion=completion.registered("sampler"),
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(help="Sample as a paper's evaluation did: dit, mdtv2, edt, uvit, maskdm, ..."),
]
Eta = Annotated[
    float | None, typer.Option(help="The noise of ddim: 0 is deterministic, 1 as noisy as ddpm.")
]
Cfg = Annotated[float | None, typer.Option(help="The guidance scale; 1 means none.")]
Guide = Annotated[
    str | None, typer.Option(help="A weaker run or weights file to guide by (autoguidance).")
]
Ema = Annotated[float | None, typer.Option(help="Which of a run's averages to use, by its decay.")]
Best = Annotated[
    bool,
    typer.Option("--best", help="Take the checkpoint whose samples measured best (best.json)."),
]
Vae = Annotated[
    str | None, typer.Option(help="The AutoencoderKL: a folder, a file or a hub id (codec.vae).")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N; the default is the GPU if there is one.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per network pass.")]
Precision = Annotated[Literal["fp32", "bf16"] | None, typer.Option(help="The network's precision.")]
Out = Annotated[
    Path | None, typer.Option(help="The folder for the PNGs; the default is samples/NAME.")
]
Png = Annotated[
    bool,
    typer.Option("--png/--no-png", help="Write one PNG an image; those that are there are kept."),
]
Npz = Annotated[
    Path | None,
    typer.Option(help="Also write an `.npz` as ADM does: arr_0 uint8 NHWC, arr_1 labels."),
]
Stats = Annotated[Path | None, typer.Option(help="Also write the statistics that `fid` takes.")]
Features = Annotated[
    str | None,
    typer.Option(help="The features of --stats; the default is inception. See `list features`."),
]
Weights = Annotated[Path | None, typer.Option(help="Inception's weights, for --stats.")]
Grid = Annotated[
    bool, typer.Option("--grid/--no-grid", help="Also write OUT.grid.png of the first 100.")
]
Interpolate = Annotated[
    str | None, typer.Option(help="Draw a strip of n images from seed A to seed B, given as A,B.")
]
Inpaint = Annotated[
    tuple[Path, Path] | None,
    typer.Option(help="Fill in IMAGE where MASK is white, n times."),
]
Trajectory = Annotated[
    bool, typer.Option("--trajectory", help="Draw the predicted clean images over time.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files that msmdiff did not write.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Set another key of sample, codec or model: `--set sample.clip=false`."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff sample` · `msmdiff sample runs/faces --n 100 --cfg 1.5 "
        "--classes 0-9` · "
        "`msmdiff sample primer --seeds 0-49999 --sampler ddpm --steps 250 --npz samples.npz` · "
        "`torchrun --nproc_per_node 8 -m -- msmdiff sample DiT-XL-2.pt --preset dit --n 50000 "
        "--no-png --stats s.npz`"
    )(sample)


def sample(
    source: Source = None,
    n: N = None,
    seeds: Seeds = None,
    classes: Classes = None,
    prompts: Prompts = None,
    steps: Steps = None,
    sampler: Sampler = None,
    preset: Preset = None,
    eta: Eta = None,
    cfg: Cfg = None,
    guide: Guide = None,
    ema: Ema = None,
    best: Best = False,
    vae: Vae = None,
    device: Device = None,
    batch_size: BatchSize = 64,
    precision: Precision = None,
    out: Out = None,
    png: Png = True,
    npz: Npz = None,
    stats: Stats = None,
    features: Features = None,
    weights: Weights = None,
    grid: Grid = True,
    interpolate: Interpolate = None,
    inpaint: Inpaint = None,
    trajectory: Trajectory = False,
    overwrite: Overwrite = False,
    sets: Sets = None,
) -> None:
    """Sample images from trained weights."""
    from msmdiff.core import machine
    from msmdiff.core.data.text import read_prompts
    from msmdiff.core.gallery import Request

    machine.use(device)
    request = Request(
        seeds=[],
        folder=out or Path("samples"),
        classes=classes,
        prompts=read_prompts(prompts) if prompts else [],
        batch_size=batch_size,
        png=png,
        npz=npz,
        stats=stats,
        features=features or "inception",
        weights=weights,
        grid=grid,
        interpolate=interpolate,
        inpaint=inpaint,
        trajectory=trajectory,
        overwrite=overwrite,
    )
    request.seeds = _seeds(n, seeds, len(request.prompts), bool(request.picture))
    _refuse_idle(request, {"--seeds": seeds, "--features": features, "--weights": weights})
    flags = {"sampler": sampler, "steps": steps, "eta": eta, "cfg_scale": cfg, "ema": ema}
    flags |= {"guide": guide, "precision": precision}
    _draw(source, request, out, _layers(preset, flags, sets, vae), best)


def _draw(
    source: list[str] | None,
    request: Any,
    out: Path | None,
    changes: tuple[list[dict[str, Any]], dict[str, Any]],
    best: bool,
) -> None:
    """Draw a request from each source, into folders of their own."""
    from msmdiff.cli.console import Console
    from msmdiff.core import weights as stored
    from msmdiff.core.gallery import Gallery
    from msmdiff.core.training import launch

    sources = source or [str(stored.newest())]
    if best:
        sources = [str(stored.best(each)) for each in sources]
    for option, path in (("--npz", request.npz), ("--stats", request.stats)):
        if len(sources) > 1 and path is not None:
            raise UsageError(
                f"{option} takes one SOURCE: several would overwrite each other's file"
            )
    layers, model_fields = changes
    device, main = launch.process()
    console = Console()
    for each in sources:
        model = stored.load(each, device, layers, **model_fields)
        if main:
            console.note(f"sampling from {_described(model)}")
        folder = (out or Path("samples")) / _name_of(each)
        if out is not None and len(sources) == 1:
            folder = out
        try:
            made = Gallery(model, replace(request, folder=folder)).make(console.progress)
        except KeyboardInterrupt:
            console.finish()
            raise KeyboardInterrupt(_left(folder, request)) from None
        if main:
            console.note(made)
    launch.leave()


def _left(folder: Path, request: Any) -> str:
    """What an interruption leaves behind."""
    whole = len(list(folder.glob("[0-9]*.png"))) if request.png and folder.is_dir() else 0
    if not whole or request.picture:
        return "interrupted: nothing was finished"
    return f"interrupted: {whole:,} images are in {folder}; the same command draws the others"


def _described(model: Any) -> str:
    """Which weights a model has: the trained ones or an average, and after how many images."""
    which = model.report.get("weights")
    seen = model.report.get("images_seen")
    parts = [f"weights {which}"] if which else []
    parts += [f"{int(seen):,} images seen"] if seen and seen.isdigit() else []
    return f"{model.path} ({', '.join(parts)})" if parts else str(model.path)


def _seeds(n: int | None, seeds: str | None, prompts: int, picture: bool) -> list[int]:
    """Which seeds are drawn. Raises UsageError where that is said twice, or there are none."""
    from msmdiff.core.seeding import parse_range

    if n is not None and seeds is not None:
        raise UsageError(f"--n {n} and --seeds {seeds} both say which seeds: give one")
    if seeds is not None:
        return list(dict.fromkeys(parse_range(seeds, "--seeds")))
    count = n if n is not None else prompts or (8 if picture else 40)
    if count < 1:
        raise UsageError(f"--n {n}: give at least one image")
    return list(range(count))


def _refuse_idle(request: Any, given: dict[str, Any]) -> None:
    """Raises UsageError for an option that has no effect beside the others, or none to have."""
    if request.npz and request.stats and request.npz.resolve() == request.stats.resolve():
        raise UsageError(f"--npz and --stats both name {request.npz}: give two names")
    for option, path in (("--npz", request.npz), ("--stats", request.stats)):
        if path is not None and path.is_dir():
            raise UsageError(f"{option} {path} is a folder: name a file")
    if not (request.png or request.npz or request.stats or request.picture):
        raise UsageError("--no-png leaves nothing to write: give --npz or --stats")
    kinds = ("interpolate", "inpaint", "trajectory")
    drawn = [f"--{kind}" for kind in kinds if getattr(request, kind)]
    idle: dict[str, Any] = {}
    if drawn:
        idle |= {"--npz": request.npz, "--stats": request.stats}
        idle |= dict.fromkeys(drawn[1:], True)
    if request.interpolate:
        idle["--seeds"] = given["--seeds"]
    if not request.stats:
        idle |= {option: given[option] for option in ("--features", "--weights")}
    for option, value in idle.items():
        if value:
            where = f"with {drawn[0]}" if drawn else "without --stats"
            raise UsageError(f"{option} has no effect {where}: leave it out")


def _layers(
    preset: str | None, flags: dict[str, Any], sets: list[str] | None, vae: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What is laid over the stored configuration, and model fields of published files."""
    from msmdiff.core import config as configuration
    from msmdiff.core.errors import nearest
    from msmdiff.core.samplers.papers import SAMPLINGS

    changes = configuration.parse_sets(sets or [])
    if set(changes) - {"sample", "codec", "model"}:
        raise UsageError(
            f"--set {' '.join(sets or [])}: only keys of sample, codec and model apply here"
        )
    base: dict[str, Any] = {}
    if preset is not None:
        if preset not in SAMPLINGS:
            near = nearest(preset, list(SAMPLINGS))
            raise UsageError(f"--preset {preset} is none of {', '.join(SAMPLINGS)}{near}")
        # A preset is complete: what the weights' own settings say beyond it does not apply.
        base = configuration.section("sample", **SAMPLINGS[preset]).model_dump()
    given = {name: value for name, value in flags.items() if value is not None}
    model_fields = changes.pop("model", {})
    codec = {} if vae is None else {"codec": {"vae": vae}}
    return [{"sample": base}, {"sample": given}, changes, codec], model_fields


def _name_of(source: str) -> str:
    """What a source's folder of samples is called: the run, or the file without its ending."""
    path = Path(source)
    if path.name == "weights.safetensors" and path.resolve().parent.name:
        return path.resolve().parent.name
    if (path / "state.pt").is_file():  # a checkpoint: its run, and which it is
        return f"{path.resolve().parents[1].name}-{path.name}"
    return path.name.removesuffix(".safetensors").removesuffix(".pt").removesuffix(".pth")
