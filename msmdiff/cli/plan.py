"""`--dry-run`: the resolved configuration, and what it costs, before anything is trained."""

import dataclasses
import os
from typing import Any

import typer

TIMED_UP_TO = 5.0
"""Seconds of a step, by its operations, up to which some steps are taken to time them."""
USUAL_SHARE = 0.3
"""Of a large matrix product's speed, what a step reaches (docs/benchmarks.md)."""
ASSUMED_CLASSES = 10
"""Where a network learns as many classes as data have that are not here."""


def show(config: Any, as_json: bool) -> None:
    """What `--dry-run` prints: the resolved configuration and what a step costs."""
    import torch

    from msmdiff.cli.console import print_json
    from msmdiff.core import build as road
    from msmdiff.core.training import cost, launch, memory, sharding

    images, classes = _data(config)
    config = road.resolve(config, classes)
    if images is not None:
        images.check(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = config.model_copy(deep=True)
    steps.train.precision = launch.choose_precision(config, device)
    counted = cost.measure(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    taken = memory.estimate(steps, processes, sharding.asked())
    seconds, how = _seconds(steps, counted, processes)
    if as_json:
        print_json(
            {
                "config": config.as_dict(),
                "images": None if images is None else len(images),
                **dataclasses.asdict(counted),
                "step_flops": counted.step_flops,
                "seconds_per_step": seconds,
                "memory": taken.as_dict(),
            }
        )
        return
    typer.echo(config.to_yaml().rstrip() + "\n")
    lines = [
        ("data", _described(images, config)),
        ("parameters", f"{counted.parameters:,}"),
        ("tokens", _tokens(counted)),
        ("per step", _step_cost(counted, config.train.batch_size)),
        ("time", _time(seconds, how, config.train.steps)),
        ("memory", _memory(taken, device, steps.train.precision)),
        *(("note", line) for line in [*_too_large(taken, device), *road.notes(config)]),
    ]
    for name, text in lines:
        typer.echo(f"# {name:<15} {text}")


def _data(config: Any) -> tuple[Any, int | None]:
    """The data and how many classes they have; None and a guess where they are not here."""
    from msmdiff.core.data import sources

    if not sources.is_data(config.data.source):
        return None, ASSUMED_CLASSES if config.model.num_classes == "auto" else None
    source = sources.open_configured(config.data)
    return source, source.num_classes


def _described(images: Any, config: Any) -> str:
    if images is None:
        assumed = ""
        if config.model.num_classes:
            assumed = f"; {config.model.num_classes} classes are taken for granted"
        return f"{config.data.source} is not here{assumed}"
    from msmdiff.core.training.telling import data_line

    return data_line(images)


def _tokens(counted: Any) -> str:
    if counted.kept == counted.tokens:
        return f"{counted.tokens}"
    hidden = 1 - counted.kept / counted.tokens
    return f"{counted.kept} of {counted.tokens} seen, {hidden:.2%} hidden"


def _seconds(config: Any, counted: Any, processes: int) -> tuple[float, str]:
    """Seconds of a step on this machine, and how that is known: timed, where that takes no long,
    else by its operations.
    """
    import statistics
    import time

    import torch

    from msmdiff.core.bench import timing
    from msmdiff.core.bench import training as trainings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = timing.matmul_peak(device, trainings.dtype_of(config))
    flops = config.train.batch_size * counted.step_flops / processes
    guessed = flops / (USUAL_SHARE * peak)
    if guessed > TIMED_UP_TO or processes > 1:
        return guessed, f"by {USUAL_SHARE:.0%} of this machine's speed of matrix products"
    take = trainings.Training(config)
    found = []
    for _ in range(5):
        started = time.perf_counter()
        take()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found[2:]), "timed on random images"


def _time(seconds: float, how: str, steps: int) -> str:
    hours = seconds * steps / 3600
    whole = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} min"
    if hours < 1 / 60:
        whole = f"{seconds * steps:,.0f} s"
    return f"about {seconds:.3g} s a step, {whole} for {steps:,} steps ({how})"


def _memory(taken: Any, device: str, precision: str) -> str:
    where = "GPU" if device == "cuda" else "CPU"
    parts = _parts(taken)
    return f"about {taken.total / 2**30:.2f} GiB of {where} memory in {precision}: {parts}"


def _too_large(taken: Any, device: str) -> list[str]:
    """A sentence where the machine has less."""
    import torch

    from msmdiff.core import systems

    own = systems.memory() or taken.total
    there = torch.cuda.mem_get_info()[1] if device == "cuda" else own
    if taken.total <= there:
        return []
    return [
        f"this machine has {there / 2**30:.1f} GiB: lower train.micro_batch_size (--set "
        "train.micro_batch_size=...), or set train.gradient_checkpointing=true"
    ]


def _step_cost(counted: Any, batch_size: int) -> str:
    """A step's operations as it is, with all its passes and copies, beside one plain pass."""
    step = batch_size * counted.step_flops / 1e9
    plain = 3 * batch_size * counted.forward_flops / 1e9
    if not counted.two_passes and counted.copies == 1 and counted.kept == counted.tokens:
        return f"{step:,.2f} GFLOP"
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
