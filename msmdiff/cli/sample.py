"""`sample`: weights or a run -> PNGs, a grid, ADM's `.npz`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff sample` · `msmdiff sample runs/faces --n 100 --cfg 1.5 --classes 0-9` · "
        "`msmdiff sample primer --seeds 0-49999 --sampler ddpm --steps 250 --npz samples.npz`"
    )(sample)


def sample(
    source: Annotated[
        list[str] | None, typer.Argument(help="Runs, their names, or weights files; default: newest.")
    ] = None,
    n: Annotated[int | None, typer.Option(help="How many images: seeds 0 to n - 1.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds as A-B, inclusive, or one seed. One seed is one image.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="As 3, 0-9 or 0,4,7: dealt to the seeds in turn. Default: all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    sampler: Annotated[Literal["ddim", "ddpm"] | None, typer.Option(help="Default: the run's, normally ddim.")] = None,
    eta: Annotated[float | None, typer.Option(help="ddim: 0 deterministic, 1 as noisy as ddpm.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    ema: Annotated[float | None, typer.Option(help="Which of a run's averages, by its decay.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per network pass.")] = 64,
    precision: Annotated[Literal["fp32", "bf16"], typer.Option(help="Of the network.")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="Folder for the PNGs; default: samples/NAME.")] = None,
    npz: Annotated[Path | None, typer.Option(help="Also write ADM's file: arr_0 uint8 NHWC, arr_1 labels.")] = None,
    grid: Annotated[bool, typer.Option("--grid/--no-grid", help="Also write OUT.grid.png of the first 100.")] = True,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Other keys of sample, codec or model: `--set sample.clip=false`.")
    ] = None,
) -> None:
    """Sample images from trained weights."""
    from msmdiff.cli.console import Console
    from msmdiff.core import weights
    from msmdiff.core.errors import UsageError

    if n is not None and seeds is not None:
        raise UsageError(f"--n {n} and --seeds {seeds} both say which seeds: give one")
    chosen = parse_range(seeds, "--seeds") if seeds is not None else list(range(40 if n is None else n))
    if not chosen:
        raise UsageError(f"--n {n}: give at least one image")
    flags = {"sampler": sampler, "steps": steps, "eta": eta, "cfg_scale": cfg, "ema": ema}
    sources = source or [str(weights.newest())]
    if len(sources) > 1 and npz is not None:
        raise UsageError("--npz takes one SOURCE: several would overwrite each other's file")
    for each in sources:
        folder = out if out and len(sources) == 1 else (out or Path("samples")) / _name_of(each)
        _sample_one(each, chosen, classes, flags, sets or [], batch_size, precision, folder, npz, grid, Console())


def _sample_one(
    source: str,
    seeds: list[int],
    classes: str | None,
    flags: dict[str, Any],
    sets: list[str],
    batch_size: int,
    precision: str,
    out: Path,
    npz: Path | None,
    want_grid: bool,
    console: Any,
) -> None:
    import numpy as np
    import torch

    import msmdiff
    from msmdiff.cli.console import write_json
    from msmdiff.core import config as configuration
    from msmdiff.core import machine, weights
    from msmdiff.core.data.images import grid
    from msmdiff.core.errors import UsageError
    from msmdiff.core.samplers.generate import generate

    machine.prepare()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changes = configuration.parse_sets(sets)
    if set(changes) - {"sample", "codec", "model"}:
        raise UsageError(f"--set {' '.join(sets)}: only keys of the sample, codec and model sections apply here")
    given = {"sample": {k: v for k, v in flags.items() if v is not None}}
    layers = (given, {k: v for k, v in changes.items() if k != "model"})
    path = weights.locate(source, ema=changes.get("sample", {}).get("ema", flags["ema"]))
    loaded = weights.load(path, device, layers, **changes.get("model", {}))
    options = loaded.config.sample
    num_classes = loaded.backbone.num_classes
    if classes is not None and not num_classes:
        raise UsageError(f"--classes {classes}: {path} is unconditional")
    wanted = parse_range(classes, "--classes") if classes is not None else list(range(num_classes))
    labels = [wanted[seed % len(wanted)] for seed in seeds] if wanted else None

    settings = {
        "weights": str(path),
        "sha256": weights.checksum(weights.file_of(path)),
        "sample": options.model_dump(mode="json"),
        "classes": classes,
        "precision": precision,
        "msmdiff": msmdiff.__version__,
        "torch": torch.__version__,
    }
    earlier = _claim(out, settings)
    autocast = torch.bfloat16 if precision == "bf16" else None
    pictures: list[Any] = []
    done = 0
    for batch in generate(
        loaded.backbone,
        loaded.process,
        loaded.codec,
        options,
        seeds,
        labels,
        num_classes=num_classes,
        batch_size=batch_size,
        device=device,
        autocast=autocast,
    ):
        pixels = batch.images.permute(0, 2, 3, 1).numpy()
        for seed, image in zip(batch.seeds, pixels, strict=True):
            _write_png(out / f"{seed:06d}.png", image)
        if npz is not None or (want_grid and done < 100):
            pictures.append(pixels)
        done += len(pixels)
        console.progress(done, len(seeds), {})
    write_json(out / "sample.json", {**settings, "seeds": _spans(sorted({*earlier, *seeds}))})
    if npz is not None:
        npz.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"arr_0": np.concatenate(pictures)}
        if labels is not None:
            arrays["arr_1"] = np.array(labels, np.int64)
        part = npz.with_name(f".{npz.name}.part.npz")
        np.savez(part, **arrays)
        part.replace(npz)
    shown = f"{len(seeds)} images in {out}/"
    if want_grid:
        target = out.with_name(f"{out.name}.grid.png")
        columns = len(wanted) if 1 < len(wanted) <= 20 and len(seeds) >= len(wanted) else None
        grid(np.concatenate(pictures)[:100], columns).save(target)
        shown += f", grid in {target}"
    console.note(shown + (f", {npz}" if npz else ""))


def parse_range(text: str, option: str) -> list[int]:
    """`7`, `0-9`, `0,4,7` or a mixture -> integers. Raises UsageError naming the option."""
    from msmdiff.core.errors import UsageError

    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span:
                raise ValueError
            numbers.extend(span)
    except ValueError:
        raise UsageError(
            f"{option} {text}: write a number, a rising range such as 0-9, or a list such as 0,4,7"
        ) from None
    return numbers


def _name_of(source: str) -> str:
    """What a source's folder of samples is called: the run, or the weights file without its ending."""
    path = Path(source)
    if path.name == "weights.safetensors" and path.resolve().parent.name:
        return path.resolve().parent.name
    return path.name.removesuffix(".safetensors").removesuffix(".pt").removesuffix(".pth")


def _claim(out: Path, settings: dict[str, Any]) -> list[int]:
    """Make the folder, or check that what it holds was sampled with the same settings: sets must not mix.

    The settings are written before the first image. Returns the seeds of an earlier, finished sampling.
    """
    import json

    from msmdiff.cli.console import write_json
    from msmdiff.core import config as configuration
    from msmdiff.core.errors import MsmdiffError, UsageError

    try:
        stored = json.loads((out / "sample.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        stored = settings
    except (OSError, ValueError) as error:
        raise MsmdiffError(f"{out / 'sample.json'} cannot be read: {error}") from None
    if any(stored.get(name) != value for name, value in settings.items()):
        old, new = (configuration.flatten(s) for s in (stored, settings))
        changed = [
            f"{name}: {old.get(name)!r} there, {value!r} now" for name, value in new.items() if old.get(name) != value
        ]
        raise UsageError(f"{out} holds images sampled with other settings ({'; '.join(changed)}): give another --out")
    if stored is settings and out.is_dir() and any(p.suffix == ".png" for p in out.iterdir()):
        raise UsageError(f"{out} holds images that were not sampled here: give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MsmdiffError(f"{out} cannot be written: {error.strerror or error}") from None
    if stored is settings:
        write_json(out / "sample.json", {**settings, "seeds": ""})
    return parse_range(stored["seeds"], "seeds") if stored.get("seeds") else []


def _write_png(path: Path, pixels: Any) -> None:
    from PIL import Image

    from msmdiff.core.errors import MsmdiffError

    part = path.with_name(f".{path.name}.part")
    try:
        Image.fromarray(pixels).save(part, format="PNG")
        part.replace(path)
    except OSError as error:
        raise MsmdiffError(f"{path} cannot be written: {error.strerror or error}; images before it are whole") from None


def _spans(seeds: list[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7"."""
    spans: list[list[int]] = []
    for seed in sorted(seeds):
        if spans and seed == spans[-1][1] + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
