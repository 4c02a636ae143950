"""Timing done right: warm-up, synchronisation, medians, FLOP/s against what the machine can do."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from msmdiff.core import build as road
from msmdiff.core.config import Config
from msmdiff.core.data.loader import Batch
from msmdiff.core.seeding import key
from msmdiff.core.training import cost, launch
from msmdiff.core.training.meter import peak_memory
from msmdiff.core.training.step import Step


@dataclass
class Timing:
    """A training step, measured.

    Attributes:
        kept, tokens: what the network sees of an image.
        images_per_s, ms_per_step: from the median step.
        flops_per_s: of forward and backward, counted on the meta device.
        peak_fraction: flops_per_s over the machine's measured matrix-product peak in the same
            precision.
        peak_memory_bytes: of the process so far (CPU) or of the device.
    """

    kept: int
    tokens: int
    images_per_s: float
    ms_per_step: float
    flops_per_s: float
    peak_fraction: float
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def training_step(config: Config, steps: int, peak: float = 0.0, warmup: int = 2) -> Timing:
    """Time the trainer's own optimiser step on random images, for a resolved configuration.

    `peak` is the machine's in FLOP/s; 0 measures it.
    """
    accelerator = launch.accelerator(config, Path())
    device = accelerator.device
    torch.manual_seed(key(config.train.seed, "init"))
    parts = road.build(config)
    step = Step(config, parts, accelerator)
    batches = _random_batches(config, parts, step.micro, device)
    seen = itertools.count(step=config.train.batch_size)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _median_seconds(lambda: step(batches, next(seen)), device, steps, warmup)
    counted = cost.measure(config)
    batch = config.train.batch_size
    flops_per_s = batch * counted.step_flops / seconds
    half = config.train.precision == "bf16"
    peak = peak or matmul_peak(device, torch.bfloat16 if half else torch.float32)
    return Timing(
        kept=counted.kept,
        tokens=counted.tokens,
        images_per_s=batch / seconds,
        ms_per_step=1000 * seconds,
        flops_per_s=flops_per_s,
        peak_fraction=flops_per_s / peak,
        peak_memory_bytes=peak_memory(device),
    )


def _random_batches(
    config: Config, parts: road.Parts, size: int, device: torch.device
) -> Iterator[Batch]:
    """The same images and labels again and again, at the positions of a training."""
    images = parts.codec.example(size, device)
    y = parts.objective.condition.example(size, device)
    for position in itertools.count(step=size):
        yield Batch(position, images, y)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what a step is measured against."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _median_seconds(lambda: a @ a, device, steps=5, warmup=2)


def _median_seconds(
    work: Callable[[], object], device: torch.device, steps: int, warmup: int
) -> float:
    times = []
    for _ in range(warmup + steps):
        _synchronise(device)
        started = time.perf_counter()
        work()
        _synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warmup:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
