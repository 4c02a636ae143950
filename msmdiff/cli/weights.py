"""`weights`: what is in a weights file."""

from typing import Annotated

import typer

group = typer.Typer(help="Weights files: show.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(group, name="weights")


@group.callback()
def _group() -> None:
    """Look into weights files."""


@group.command(epilog="Examples: `msmdiff weights show runs/primer` · `msmdiff weights show model.safetensors --json`")
def show(
    source: Annotated[str, typer.Argument(help="A weights file, a run, or a run's name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Show what a weights file holds: network, space, noise, how long it was trained, its checksum."""
    from msmdiff.cli.console import Console, print_json
    from msmdiff.core import weights

    path = weights.locate(source)
    stored = weights.read(path)
    config, count = stored.config, sum(v.numel() for v in stored.tensors.values())
    if as_json:
        print_json(
            {
                "path": str(path),
                "sha256": weights.checksum(path),
                "parameters": count,
                "tensors": {name: list(v.shape) for name, v in stored.tensors.items()},
                "notes": stored.notes,
                "config": config.as_dict(),
            }
        )
        return
    model = config.model.model_dump(exclude={"name", "family", "num_classes"})
    images = int(stored.notes.get("images_seen", 0))
    codec = config.codec.name + (
        f" {config.codec.wavelet} level {config.codec.level}" if config.codec.name == "dwt" else ""
    )
    rows = [
        ("file", f"{path} ({path.stat().st_size / 2**20:.1f} MiB)"),
        ("sha256", weights.checksum(path)),
        ("network", f"{config.model.name or 'custom'} ({config.model.family}), {count:,} numbers"),
        ("dimensions", ", ".join(f"{k} {v}" for k, v in model.items())),
        ("classes", str(config.model.num_classes or "unconditional")),
        ("space", f"{codec}, images of {config.data.image_size} pixels"),
        ("noise", f"{config.process.schedule}, {config.process.timesteps} steps, predicts {config.process.prediction}"),
        (
            "trained",
            f"{images:,} images ({stored.notes.get('weights', 'model')}), {config.objective.name}, "
            f"mask {config.mask.ratio:g} {config.mask.kind}",
        ),
        ("data", config.data.source),
    ]
    Console().table("weights", ("what", "value"), rows)
