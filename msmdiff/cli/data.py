"""`data`: encode, inspect and pack data sets, and train a classifier of one."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Labels = Annotated[
    str | None, typer.Option(help="Where classes come from: auto, folders, adm or none.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set a key of data or codec: `--set codec.tile=true`."),
]
Skip = Annotated[
    bool, typer.Option("--skip-unreadable", help="Leave unreadable images out instead of stopping.")
]


Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a file that is there already.")
]

Source = Annotated[
    str,
    typer.Argument(help="The images (a folder, a zip, ...), or the latents of another project."),
]
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--out", help="The folder of the packed set; the same command goes on in it."
    ),
]
Vae = Annotated[str | None, typer.Option(help="The autoencoder: a folder, a file or a hub id.")]
ImageSize = Annotated[int, typer.Option(help="Side of the images, in pixels.")]
Codec = Annotated[
    str, typer.Option(help="`pixel` packs the cropped images themselves, also for dwt.")
]
Mirror = Annotated[
    bool, typer.Option("--mirror", help="Also encode mirrored images, which data.hflip needs.")
]
Captions = Annotated[
    str | None,
    typer.Option(help="The captions: `txt` for a NAME.txt beside each image, or a JSON file."),
]
Text = Annotated[str, typer.Option(help="CLIP's text encoder: a folder or a hub id.")]
Dtype = Annotated[Literal["float16", "float32"], typer.Option(help="The type of stored moments.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images per network pass.")]
Shard = Annotated[
    int, typer.Option(min=1, help="How many images are written, and resumed, as one.")
]


def register(app: typer.Typer) -> None:
    """Add the group of commands."""
    group = typer.Typer(
        help="Look at data sets, encode them to latents, pack them, or train a classifier of them.",
        no_args_is_help=True,
    )
    group.command(
        epilog="Examples: `msmdiff data encode imagenet/ -o latents --vae "
        "stabilityai/sd-vae-ft-ema --mirror` · "
        "`msmdiff data encode train2014/ -o coco --vae sd-vae/ --captions captions_train2014.json "
        "--text clip/` · "
        "`torchrun --nproc_per_node 8 -m -- msmdiff data encode imagenet/ -o latents --vae sd-vae/`"
    )(encode)
    group.command(
        epilog="Examples: `msmdiff data inspect photos/ --sheet sheet.png` · `msmdiff data "
        "inspect latents --speed`"
    )(inspect)
    group.command(epilog="Example: `msmdiff data pack photos/ -o photos.zip --image-size 256`")(
        pack
    )
    group.command(
        epilog="Examples: `msmdiff data features photos/ -o net.safetensors` · then `msmdiff fid "
        "samples/faces photos/ --crop 64 --features net.safetensors`"
    )(features)
    group.command(
        epilog="Examples: `msmdiff data split photos/` · `msmdiff data split photos/ -o parts "
        "--share 0.2`, which writes parts/train.zip and parts/test.zip"
    )(split)
    app.add_typer(group, name="data")


def encode(
    source: Source,
    out: Out,
    vae: Vae = None,
    image_size: ImageSize = 256,
    codec: Codec = "vae",
    mirror: Mirror = False,
    captions: Captions = None,
    text: Text = "openai/clip-vit-large-patch14",
    labels: Labels = None,
    dtype: Dtype = "float16",
    batch_size: BatchSize = 8,
    shard: Shard = 1024,
    skip_unreadable: Skip = False,
    sets: Sets = None,
) -> None:
    """Encode images to latents once, so that training reads them at the speed of memory.

    The set keeps each latent's mean and deviation: training draws a fresh sample at every visit.
    """
    import os

    import torch

    from msmdiff.cli.console import Console
    from msmdiff.core import machine
    from msmdiff.core.data import encode as encoding
    from msmdiff.core.data.checking import open_training
    from msmdiff.core.data.text import Captions, TextEncoder

    machine.prepare()
    console = Console(prefix=f"[{os.environ['RANK']}] " if "RANK" in os.environ else "")
    flags = {"source": source, "image_size": image_size, "labels": labels}
    flags["skip_unreadable"] = skip_unreadable
    config = _configure(flags, {"name": codec, "vae": vae}, sets)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    # What may be missing is asked for first: the images are all decoded once when they are opened.
    encoding.require_free(out)
    space = _loaded(config, device)
    encoder = TextEncoder(text, device) if captions else None
    images = open_training(config.data, console.note)
    texts = Captions.read(images, captions, encoder) if captions and encoder else None
    count = encoding.encode(
        images,
        space,
        config.data,
        out,
        progress=console.progress,
        captions=texts,
        mirror=mirror,
        dtype=dtype,
        batch_size=batch_size,
        shard=shard,
        device=device,
    )
    console.finish()
    told = f"{out}: {count:,} images encoded now, of {len(images):,}"
    console.note(f"{told}; next: {_next(config, out, captions is not None)}")


def _next(config: Any, out: Path, captions: bool) -> str:
    """The command that trains on a packed set."""
    words = ["msmdiff", "train", "--data", str(out), "--codec", config.codec.name]
    words += ["--image-size", str(config.data.image_size)]
    return shlex.join(words + (["--model", "U-ViT-S/2-T2I"] if captions else []))


def _loaded(config: Any, device: str) -> Any:
    """The codec, with its weights where images have to be encoded. Raises what `load` raises."""
    from msmdiff.core.data import sources
    from msmdiff.core.data.latents import Latents
    from msmdiff.core.diffusion import codecs

    space = codecs.build(config.codec, config.data.image_size)
    if not isinstance(sources.open_configured(config.data), Latents):
        space.load(device)
    return space


def inspect(
    source: Annotated[
        str, typer.Argument(help="Images, a packed set, or the latents of another project.")
    ],
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet (PNG) of images chosen at random.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many images are on the sheet.")] = 64,
    vae: Annotated[
        str | None,
        typer.Option(
            help="The autoencoder that decodes latents for the sheet; by default what made them."
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Time reading a shuffled epoch as training does.")
    ] = False,
    labels: Labels = None,
    sets: Sets = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """Show what a data set holds: images, classes, sizes, and files that cannot be read.

    The exit code is 1 if there are unreadable files.
    """
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import files
    from msmdiff.core.data import inspection, sources
    from msmdiff.core.errors import UsageError

    space = {} if vae is None else {"name": "vae", "vae": vae}
    config = _configure({"source": source, "labels": labels}, space, sets)
    found = sources.open_configured(config.data)
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise UsageError(f"--sheet {sheet}: give a name that ends in .png")
    if sheet is not None and sheet.exists() and not overwrite:
        raise UsageError(f"--sheet {sheet} is there already: give another name, or --overwrite")
    report = inspection.report(found) | (inspection.read_speed(found, config.data) if speed else {})
    if as_json:
        print_json(report)
    else:
        for name, value in report.items():
            Console().note(f"{name:15} {_shown(value)}")
    if sheet is not None:
        with files.atomic(sheet) as part:
            inspection.contact_sheet(found, config.codec, count).save(part, format="PNG")
    if report.get("unreadable"):
        raise typer.Exit(1)


def pack(
    source: Annotated[str, typer.Argument(help="The images: a folder, an LMDB, ...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The zip archive.")],
    image_size: Annotated[
        int | None,
        typer.Option(
            min=2, help="Crop images to PNGs of this side; by default the files stay as they are."
        ),
    ] = None,
    labels: Labels = None,
    skip_unreadable: Skip = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack images into one zip, which is read as fast as a folder and copied much faster."""
    from msmdiff.cli.console import Console
    from msmdiff.core.data import inspection
    from msmdiff.core.data.checking import open_training

    console = Console()
    config = _configure(
        {"source": source, "labels": labels, "skip_unreadable": skip_unreadable}, {}, None
    )
    inspection.require_target(out, overwrite)
    images = open_training(config.data, console.note)
    inspection.pack(images, out, image_size, console.progress, overwrite)
    console.finish()
    console.note(f"{out}: {len(images):,} images, {out.stat().st_size / 2**20:,.1f} MiB")


def features(
    source: Annotated[
        str, typer.Argument(help="Images with classes, such as a folder of folders.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The file of the network, .safetensors.")
    ],
    image_size: Annotated[
        int, typer.Option(min=8, max=256, help="The side of the images that it sees.")
    ] = 32,
    steps: Annotated[
        int, typer.Option(min=10, help="Steps of 128 images; 500 take a minute on a CPU.")
    ] = (500),
    seed: Annotated[int, typer.Option(min=0, help="The seed of the training.")] = 0,
    labels: Labels = None,
    skip_unreadable: Skip = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a small classifier of your images, to measure distances with `fid --features OUT`.

    It needs no download, and sees shapes that pixels do not. The distance is not FID.
    """
    import os

    import torch

    from msmdiff.cli.console import Console
    from msmdiff.core import files, machine
    from msmdiff.core.data.checking import open_training
    from msmdiff.core.errors import UsageError
    from msmdiff.core.metrics import classifier

    if out.suffix != ".safetensors":
        raise UsageError(f"-o {out}: give a name that ends in .safetensors")
    files.require_writable(out)
    files.require_ours(out, os.path.lexists(out) and classifier.ours(out), overwrite)
    machine.prepare()
    console = Console()
    flags = {"source": source, "labels": labels, "skip_unreadable": skip_unreadable}
    images = open_training(_configure(flags, {}, None).data, console.note)
    made = classifier.train(
        images,
        out,
        side=image_size,
        steps=steps,
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
        progress=lambda done, total: console.progress(
            done * classifier.BATCH, total * classifier.BATCH, {}
        ),
    )
    console.finish()
    console.note(
        f"{out}: {made.classes} classes, {made.accuracy:.1%} right of a tenth that it did not "
        f"train on (chance: {1 / made.classes:.1%})"
    )


def split(
    source: Annotated[str, typer.Argument(help="The images: a folder, a zip, ...")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="The folder for train.zip and test.zip; by default nothing is written.",
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="The share of the images that is held out.")] = 0.1,
    seed: Annotated[
        int, typer.Option(min=0, help="The seed of the parts; another one gives others.")
    ] = 0,
    labels: Labels = None,
    overwrite: Overwrite = False,
) -> None:
    """Divide images into a part to train on and a part that is held out.

    An image's part depends on its name alone, so it stays there when others come or go.
    `--data SOURCE:train` and `SOURCE:test` are these parts, for the default share and seed.
    """
    from msmdiff.cli.console import Console
    from msmdiff.core.data import halves, inspection, sources
    from msmdiff.core.errors import UsageError

    if not 0 < share < 1:
        raise UsageError(f"--share {share:g}: give a number between 0 and 1, such as 0.1")
    console = Console()
    config = _configure({"source": source, "labels": labels}, {}, None)
    parts = dict(zip(("train", "test"), halves.split(sources.open_configured(config.data), share,
                                                     seed), strict=True))  # fmt: skip
    for name, part in parts.items():
        counts = part.class_counts
        rows = [f"{part.class_names[i]} {count:,}" for i, count in enumerate(counts)]
        console.note(f"{name}: {len(part):,} images{': ' if rows else ''}{', '.join(rows)}")
    if out is None:
        if (share, seed) == (halves.SHARE, halves.SEED):
            console.note(f"train on it: msmdiff train --data {source}:train")
        return
    for name in parts:
        inspection.require_target(out / f"{name}.zip", overwrite)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        inspection.pack(part, out / f"{name}.zip", None, console.progress, overwrite)
        console.finish()
    console.note(f"{out}/train.zip, {out}/test.zip; next: msmdiff train --data {out}/train.zip "
                 f"--set eval.heldout={out}/test.zip")  # fmt: skip


def _configure(data: dict[str, Any], codec: dict[str, Any], sets: list[str] | None) -> Any:
    """The configuration of the flags that were given, and of --set."""
    from msmdiff.core import config as configuration
    from msmdiff.core.errors import UsageError

    changes = configuration.parse_sets(sets or [])
    if set(changes) - {"data", "codec"}:
        raise UsageError(
            f"--set: only keys of data and codec apply here, not {', '.join(sorted(changes))}"
        )
    if changes.get("data", {}).get("crop") == "random":
        raise UsageError("--set data.crop=random: images are cropped once here, in the centre")
    given = [{k: v for k, v in flags.items() if v is not None} for flags in (data, codec)]
    return configuration.build({"data": given[0], "codec": given[1]}, changes)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_shown(v)}" for name, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value[:20])) + (
            f" and {len(value) - 20} more" if len(value) > 20 else ""
        )
    return f"{value:,.{0 if value >= 1000 else 3}f}" if isinstance(value, float) else str(value)
