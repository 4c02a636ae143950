"""`bench`: how fast a training step is, with and without the mask."""

from typing import Annotated, Any, Literal

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: `msmdiff bench` · `msmdiff bench --model MaskDM-S/4 --image-size 64 "
        "--batch-size 16` · "
        "`msmdiff bench --config digits-pretrain --mask 0.5 --mask 0.9 --json`"
    )(bench)


def bench(
    config: Annotated[str | None, typer.Option(help="A preset's name or a YAML file.")] = None,
    model: Annotated[str | None, typer.Option(help="Size by name.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the images, in pixels.")] = None,
    codec: Annotated[
        Literal["pixel", "dwt", "vae"] | None, typer.Option(help="Space to train in.")
    ] = None,
    mask: Annotated[
        list[float] | None, typer.Option(help="A ratio to compare with no mask; may be repeated.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps, after two of warm-up.")] = 10,
    precision: Annotated[
        Literal["auto", "fp32", "bf16"] | None, typer.Option(help="Default: the configuration's.")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Any other key: `--set train.compile=true`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Only JSON, on stdout.")] = False,
) -> None:
    """Time whole training steps on random images: without a mask, and with each of the given ones.

    Without --mask: 0.9, or MDT's and EDT's own two passes.
    """
    import torch

    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import bench as timing
    from msmdiff.core import build as road
    from msmdiff.core import config as configuration
    from msmdiff.core import presets
    from msmdiff.core.training.launch import choose_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = presets.read(config) if config else {}
    flags: dict[str, Any] = {
        "model.name": model,
        "data.image_size": image_size,
        "codec.name": codec,
        "train.batch_size": batch_size,
        "train.precision": precision,
    }
    rows: list[timing.Timing] = []
    peak = 0.0
    asked: list[tuple[float, str]] = [(0.0, "dsm")]
    for ratio, objective in asked:
        masked = {"mask": {"ratio": ratio}, "objective": {"name": objective}}
        chosen = configuration.build(
            preset, configuration.nest(flags), masked, configuration.parse_sets(sets or [])
        )
        chosen = road.resolve(chosen, data_classes=10)
        if not rows:  # MDT and EDT have masks of their own
            own = [0.0] if chosen.model.family in road.TWO_PASSES else [0.9]
            asked += [(r, "auto") for r in mask or own]
        chosen.train.precision = choose_precision(chosen, device.type)
        dtype = torch.bfloat16 if chosen.train.precision == "bf16" else torch.float32
        peak = peak or timing.matmul_peak(device, dtype)
        rows.append(timing.training_step(chosen, device, steps, peak))
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    if as_json:
        print_json(
            {
                "device": name,
                "torch": torch.__version__,
                "model": chosen.model.name,
                "precision": chosen.train.precision,
                "batch_size": chosen.train.batch_size,
                "matmul_peak_flops_per_s": peak,
                "results": [row.as_dict() for row in rows],
            }
        )
        return
    title = (
        f"{chosen.model.name}, {chosen.data.image_size} px, batch {chosen.train.batch_size}, "
        f"{chosen.train.precision}, "
        f"{name}, matrix peak {peak / 1e12:.2f} TFLOP/s"
    )
    header = ("tokens seen", "images/s", "ratio", "ms/step", "TFLOP/s", "of peak", "memory")
    Console().table(
        title,
        header,
        [
            (
                f"{row.kept} of {row.tokens}",
                f"{row.images_per_s:,.1f}",
                f"{row.images_per_s / rows[0].images_per_s:.2f}",
                f"{row.ms_per_step:,.1f}",
                f"{row.flops_per_s / 1e12:.3f}",
                f"{row.peak_fraction:.0%}",
                f"{row.peak_memory_bytes / 2**30:.2f} GiB",
            )
            for row in rows
        ],
    )
