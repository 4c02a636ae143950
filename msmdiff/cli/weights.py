"""`weights`: what is in a weights file, the published layouts, and the hub."""

from pathlib import Path
from typing import Annotated, Any

import typer

from msmdiff.cli import averages, completion

group = typer.Typer(
    help="Show weights files, convert published ones, or export to their layouts.",
    no_args_is_help=True,
)


def register(app: typer.Typer) -> None:
    """Add the group."""
    averages.register(group)
    app.add_typer(group, name="weights")


@group.callback()
def _group() -> None:
    """Look into weights files; open the published ones and write their layouts back."""


@group.command(
    epilog="Examples: `msmdiff weights show runs/primer` · `msmdiff weights show "
    "DiT-XL-2-256x256.pt --keys`"
)
def show(
    source: Annotated[
        str, typer.Argument(help="A weights file (ours or published), a run, or a run's name.")
    ],
    keys: Annotated[bool, typer.Option("--keys", help="List the tensors.")] = False,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set what shapes do not tell: `model.num_heads=16`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what a weights file holds: network, cost, space, noise, training and checksum."""
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import build as road
    from msmdiff.core import weights
    from msmdiff.core.files import checksum
    from msmdiff.core.training import cost

    path = weights.locate(source)
    stored = weights.read(path, model_fields(sets))
    console = Console()
    if keys:
        rows = []
        for name, value in stored.tensors.items():
            shape = " x ".join(map(str, value.shape))
            rows.append((name, shape, str(value.dtype).removeprefix("torch.")))
        console.table(f"{len(rows)} tensors in {path}", ("name", "shape", "type"), rows)
        return
    counted = cost.measure(road.resolve(stored.config))
    digest = checksum(weights.file_of(path))
    if not as_json:
        console.table("weights", ("what", "value"), _rows(stored, counted, digest))
        return
    multiply_adds = {"full": counted.forward_flops // 2, "masked": counted.masked_flops // 2}
    print_json(
        {
            "path": str(path),
            "sha256": digest,
            "parameters": counted.parameters,
            "multiply_adds": multiply_adds,
            "tensors": {name: list(v.shape) for name, v in stored.tensors.items()},
            "notes": stored.notes,
            "config": stored.config.as_dict(),
        }
    )


def _rows(stored: Any, counted: Any, digest: str) -> list[tuple[str, str]]:
    """What a weights file is, for people."""
    from msmdiff.core import weights
    from msmdiff.core.diffusion import codecs

    config, notes = stored.config, stored.notes
    fields = config.model.model_dump(exclude={"name", "family", "num_classes"})
    codec = codecs.build(config.codec, config.data.image_size)
    megabytes = weights.file_of(stored.path).stat().st_size / 2**20
    size = config.model.name or notes.get("size") or "no published size"
    seen = ""
    if counted.kept < counted.tokens:
        seen = f", {counted.masked_flops / 2e9:,.2f} with {counted.kept} seen"
    gmacs = f"{counted.forward_flops / 2e9:,.2f} G multiply-adds"
    images = f", images of {config.data.image_size} pixels"
    noise = f"{config.process.schedule}, {config.process.timesteps} steps"
    rows = [
        ("file", f"{stored.path} ({megabytes:.1f} MiB)"),
        ("sha256", digest),
        ("network", f"{size} ({config.model.family}), {counted.parameters:,} parameters"),
        ("forward", f"{gmacs}, {counted.tokens} tokens{seen}"),
        ("dimensions", ", ".join(f"{key} {value}" for key, value in fields.items())),
        ("classes", _classes(config, notes)),
        ("space", f"{codec.describe()}, {' x '.join(map(str, codec.shape))}{images}"),
        ("noise", f"{noise}, predicts {config.process.prediction}"),
    ]
    if "layout" in notes:
        rows.append(("trained", f"published by {notes['layout']}, {notes['weights']}"))
        return rows
    trained = f"{int(notes.get('images_seen', 0)):,} images ({notes.get('weights', 'model')})"
    mask = f"mask {config.mask.ratio:g} {config.mask.kind}"
    rows.append(("trained", f"{trained}, {config.objective.name}, {mask}"))
    rows.append(("data", config.data.source))
    return rows


def _classes(config: Any, notes: dict[str, str]) -> str:
    """How many classes there are, their names, and how many images each had."""
    import json

    names, counts = (json.loads(notes.get(f"class_{key}", "[]")) for key in ("names", "counts"))
    if not (config.model.num_classes and names):
        return str(config.model.num_classes or "unconditional")
    known = len(counts) == len(names)
    shown = [f"{name} ({counts[i]:,})" if known else name for i, name in enumerate(names[:20])]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{config.model.num_classes}: {', '.join(shown)}{more}"


@group.command(
    epilog="Examples: `msmdiff weights convert DiT-XL-2-256x256.pt` · "
    "`msmdiff weights convert model-200.pt -o celebahq.safetensors` · "
    "`msmdiff weights convert mine.pth --set model.num_heads=6`"
)
def convert(
    file: Annotated[
        str, typer.Argument(help="A checkpoint that DiT, SiT, MDT, EDT, U-ViT or MaskDM wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file to write; by default FILE with the ending .safetensors."
        ),
    ] = None,
    family: Annotated[
        str,
        typer.Option(
            help="Whose file it is; `auto` recognises it by its keys. See `list layouts`."
        ),
    ] = "auto",
    ema: Annotated[
        bool,
        typer.Option("--ema/--no-ema", help="Take the averaged weights, where the file has them."),
    ] = True,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set what shapes do not tell: `model.num_heads=16`."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that msmdiff did not write.")
    ] = False,
) -> None:
    """Convert a published checkpoint into one self-describing weights file."""
    from msmdiff.cli.console import Console
    from msmdiff.core import files, weights
    from msmdiff.core.errors import UsageError

    path = Path(file)
    if weights.is_ours(path):
        raise UsageError(
            f"{file} is msmdiff's already: `msmdiff weights export` writes a published layout"
        )
    target = out or files.named(path).with_suffix(".safetensors")
    if target.exists() and target.samefile(path):
        raise UsageError(f"{target} would replace the file it is read from: give another --out")
    files.require_ours(target, weights.is_conversion(target), overwrite)
    stored = weights.read(path, model_fields(sets), ema, family)
    weights.save(target, stored.tensors, stored.config, **stored.notes)
    size = stored.notes["size"] or "no published size"
    Console().note(
        f"{target}: {stored.config.model.family}, {size}, "
        f"{sum(v.numel() for v in stored.tensors.values()):,} numbers, "
        f"from {stored.notes['weights']}"
    )


@group.command(
    epilog="Examples: `msmdiff weights export runs/mine --format uvit -o nnet_ema.pth` · "
    "`msmdiff weights export dit.safetensors --format dit`"
)
def export(
    source: Annotated[str, typer.Argument(help="A weights file, a run, or a run's name.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format", help="Whose layout to write: diffusers, or one of `list layouts`."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The file to write; by default SOURCE's name with .FORMAT.pt."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set what shapes do not tell: `model.num_heads=16`."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Write weights in a published layout: a torch file, or diffusers' folder of a DiT."""
    from msmdiff.cli.console import Console
    from msmdiff.core import build as road
    from msmdiff.core import files, tensor_files, weights
    from msmdiff.core.weights import diffusers, published

    path = weights.locate(source)
    stem = path.parent.name if path.name == "weights.safetensors" else path.stem
    target = out or Path(f"{stem}.{layout}" + ("" if layout == "diffusers" else ".pt"))
    settings, numbers = target / "config.json", target / "diffusion_pytorch_model.safetensors"
    for output in (settings, numbers) if layout == "diffusers" else (target,):
        # A published layout has no place for the mark of who wrote it.
        files.require_ours(output, ours=False, overwrite=overwrite)
    stored = weights.read(path, model_fields(sets))
    config = road.resolve(stored.config)
    parts = road.build(config)
    if layout == "diffusers":
        about, state = diffusers.export(stored.tensors, config.model, parts.codec.shape)
        files.write_json(settings, about)
        tensor_files.write(numbers, state, {"format": "pt"})
    else:
        state = published.export(stored.tensors, config.model, parts.codec.shape, layout)
        content = published.file_content(state, parts.process, layout)
        tensor_files.write_torch(target, content)
    Console().note(f"{target}: {len(state)} tensors in {layout}'s layout")
    if layout == "diffusers":
        Console().note(f"note: {diffusers.CAVEAT}")


@group.command(
    epilog="Examples: `msmdiff weights push runs/tuned me/digits-uvit --license apache-2.0` · "
    "`msmdiff weights push tuned ./shared/tuned`"
)
def push(
    source: Annotated[
        str,
        typer.Argument(
            help="A run, its name, a checkpoint or a weights file of ours.",
            autocompletion=completion.runs,
        ),
    ],
    target: Annotated[
        str, typer.Argument(help="A repository of the hub, OWNER/NAME, or a folder such as ./NAME.")
    ],
    ema: Annotated[
        float | None, typer.Option(help="Which of a run's averages to publish, by its decay.")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="The weights' licence, as the hub names it: apache-2.0, cc-by-4.0, ..."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository that only you see.")
    ] = False,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Write the model card, README.md.")
    ] = True,
    message: Annotated[
        str, typer.Option("--message", "-m", help="The commit's message.")
    ] = "Upload weights with msmdiff",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that msmdiff did not write.")
    ] = False,
) -> None:
    """Publish weights with a model card: on the Hugging Face Hub, or in a folder."""
    from msmdiff.cli.console import Console
    from msmdiff.core import weights
    from msmdiff.core.weights import sharing

    path = weights.locate(source, ema=ema)
    terms = sharing.Terms(license=license, private=private, with_card=card, message=message)
    place = sharing.push(path, target, terms, overwrite)
    console = Console()
    for key, value in sharing.local_paths(path):
        console.note(f"note: the file tells others your {key}: {value}")
    console.note(f"{place}: {path} is published; next: msmdiff weights pull {target}")


@group.command(
    epilog="Examples: `msmdiff weights pull me/digits-uvit` · "
    "`msmdiff weights pull me/digits-uvit --revision v1 -o digits-v1` · "
    "`msmdiff weights pull ./shared/tuned -o mine`"
)
def pull(
    source: Annotated[
        str, typer.Argument(help="A repository of the hub, OWNER/NAME, or a folder such as ./NAME.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The folder to write; by default NAME, in this one."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the repository.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that msmdiff did not write.")
    ] = False,
) -> None:
    """Fetch weights that `weights push` published; they are checked, and open like a run."""
    from msmdiff.cli.console import Console
    from msmdiff.core.errors import UsageError
    from msmdiff.core.weights import sharing

    if revision is not None and sharing.is_folder(source):
        raise UsageError(f"--revision {revision} has no effect with the folder {source}")
    target = out or Path(Path(source).name)
    path = sharing.pull(source, target, revision, overwrite)
    Console().note(f"{path}; next: msmdiff sample {target}")


def model_fields(sets: list[str] | None) -> dict[str, Any]:
    """`["model.num_heads=16"]` -> `{"num_heads": 16}`. Raises UsageError for keys of other
    sections.
    """
    from msmdiff.core import config as configuration
    from msmdiff.core.errors import UsageError

    changes = configuration.parse_sets(sets or [])
    if set(changes) - {"model"}:
        raise UsageError(
            f"--set: only keys of the model section apply here, not {', '.join(sorted(changes))}"
        )
    return changes.get("model", {})
