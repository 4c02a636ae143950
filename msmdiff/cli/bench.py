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
    codec: Annotated[str | None, typer.Option(help="Space to train in (`list codecs`).")] = None,
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
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import config as configuration
    from msmdiff.core import presets

    flags: dict[str, Any] = {
        "model.name": model,
        "data.image_size": image_size,
        "codec.name": codec,
        "train.batch_size": batch_size,
        "train.precision": precision,
    }
    preset = presets.read(config) if config else {}
    layers = [preset, configuration.nest(flags), configuration.parse_sets(sets or [])]
    report = _measure(layers, mask, steps)
    if as_json:
        print_json(report)
        return
    peak = report["matmul_peak_flops_per_s"]
    title = (
        f"{report['model']}, {report['image_size']} px, batch {report['batch_size']}, "
        f"{report['precision']}, {report['device']}, matrix peak {peak / 1e12:.2f} TFLOP/s"
    )
    header = ("tokens seen", "images/s", "ratio", "ms/step", "TFLOP/s", "of peak", "memory")
    rows = report["results"]
    Console().table(title, header, [_row(row, rows[0]) for row in rows])


def _measure(layers: list[dict[str, Any]], masks: list[float] | None, steps: int) -> dict[str, Any]:
    """Every asked step of a configuration, without a mask first, and on what it was measured."""
    import torch

    from msmdiff.core import backbones
    from msmdiff.core.bench import training as timing
    from msmdiff.core import build as road
    from msmdiff.core import config as configuration
    from msmdiff.core.training.launch import choose_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[timing.Timing] = []
    peak = 0.0
    asked: list[tuple[float, str]] = [(0.0, "dsm")]
    for ratio, objective in asked:
        masked = {"mask": {"ratio": ratio}, "objective": {"name": objective}}
        chosen = configuration.build(*layers[:-1], masked, layers[-1])
        chosen = road.resolve(chosen, data_classes=10)
        if not rows:  # MDT and EDT have masks of their own
            own = backbones.network_class(chosen.model).published_objective is not None
            asked += [(r, "auto") for r in masks or [0.0 if own else 0.9]]
        chosen.train.precision = choose_precision(chosen, device.type)
        half = chosen.train.precision == "bf16"
        peak = peak or timing.timing.matmul_peak(device, torch.bfloat16 if half else torch.float32)
        rows.append(timing.training_step(chosen, steps, peak))
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "torch": torch.__version__,
        "model": chosen.model.name,
        "image_size": chosen.data.image_size,
        "precision": chosen.train.precision,
        "batch_size": chosen.train.batch_size,
        "matmul_peak_flops_per_s": peak,
        "results": [row.as_dict() for row in rows],
    }


def _row(row: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['kept']} of {row['tokens']}",
        f"{row['images_per_s']:,.1f}",
        f"{row['images_per_s'] / first['images_per_s']:.2f}",
        f"{row['ms_per_step']:,.1f}",
        f"{row['flops_per_s'] / 1e12:.3f}",
        f"{row['peak_fraction']:.0%}",
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
    )
