"""`--dry-run`: the resolved configuration, and what it costs, before anything is trained."""

import dataclasses
from typing import Any

import typer


def show(config: Any, as_json: bool) -> None:
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
