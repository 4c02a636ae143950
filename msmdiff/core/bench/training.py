"""`bench train`: the trainer's own step, as a whole and in its parts."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.bench import timing
from msmdiff.core.bench.timing import Clock, Watched
from msmdiff.core.config import Config
from msmdiff.core.data.loader import Batch
from msmdiff.core.layers import all_tokens, merge
from msmdiff.core.seeding import key
from msmdiff.core.training import cost, launch, memory
from msmdiff.core.training.meter import forget_peak, peak_memory
from msmdiff.core.training.step import Step

PARTS = ("data", "encode", "forward", "backward", "optimiser", "ema")
"""What a step is made of: its batch, the codec, the objective with the network, the backward pass,
clipping and the optimiser, the averages. What is left is `other`."""


@dataclass
class Timing:
    """A training step, measured.

    Attributes:
        kept, tokens: what the network sees of an image.
        images_per_s, ms_per_step: from the median step.
        flops_per_s: of forward and backward, counted on the meta device.
        peak_fraction: flops_per_s over the machine's measured matrix-product peak in the same
            precision.
        peak_memory_bytes: of the process since it began to measure this (CPU) or of the device.
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


class Training:
    """A training that is ready to take steps; calling it takes the next one.

    Args:
        config: resolved, with its precision chosen.
        batches: what it trains on; None: the same random images again and again.
    """

    def __init__(self, config: Config, batches: Iterator[Batch] | None = None) -> None:
        self.config = config
        accelerator = launch.accelerator(config, Path())
        self.device: torch.device = accelerator.device
        forget_peak(self.device)
        torch.manual_seed(key(config.train.seed, "init"))
        self.parts = road.build(config, self.device)
        self.step = Step(config, self.parts, accelerator)
        random = _random_batches(config, self.parts, self.step.micro, self.device)
        self.batches = batches or random
        self._seen = itertools.count(step=config.train.batch_size)

    def __call__(self) -> Any:
        return self.step(self.batches, next(self._seen))

    def breakdown(self, steps: int) -> dict[str, float]:
        """Median milliseconds of each of PARTS, of `other` and of the `whole` step.

        The step is the trainer's own: what it calls is watched from outside. A GPU is waited for
        around each part, which costs the overlap of its work with Python's.
        """
        step, clock = self.step, Clock(self.device)
        own = step.parts, step.accelerator, step.optimizer, step.averages
        parts: Any = step.parts
        step.parts = replace(
            parts,
            codec=Watched(parts.codec, clock, encode="encode"),
            objective=Watched(parts.objective, clock, __call__="forward"),
        )
        step.accelerator = Watched(
            step.accelerator, clock, backward="backward", clip_grad_norm_="optimiser"
        )
        step.optimizer = Watched(step.optimizer, clock, step="optimiser", zero_grad="optimiser")
        averages: Any = Watched(step.averages, clock, update="ema")
        step.averages = averages
        batches: Any = _watched_batches(self.batches, clock)
        try:
            found = [self._split(batches, clock) for _ in range(steps + 1)][1:]
        finally:
            step.parts, step.accelerator, step.optimizer, step.averages = own
        return {name: 1000 * statistics.median(f[name] for f in found) for name in found[0]}

    def _split(self, batches: Iterator[Batch], clock: Clock) -> dict[str, float]:
        clock.start()
        with clock.part("whole"):
            self.step(batches, next(self._seen))
        seconds = {name: clock.seconds[name] for name in PARTS}
        whole = clock.seconds["whole"]
        return {**seconds, "other": whole - sum(seconds.values()), "whole": whole}


def training_step(config: Config, steps: int, peak: float = 0.0, warmup: int = 2) -> Timing:
    """Time the trainer's own optimiser step on random images, for a resolved configuration.

    `peak` is the machine's in FLOP/s; 0 measures it.
    """
    return timed(Training(config), steps, peak, warmup)


def timed(training: Training, steps: int, peak: float = 0.0, warmup: int = 2) -> Timing:
    """Time the steps of a training."""
    config, device = training.config, training.device
    seconds = timing.median_seconds(training, device, steps, warmup)
    return summed_up(training, seconds, peak or timing.matmul_peak(device, dtype_of(config)))


def summed_up(training: Training, seconds: float, peak: float) -> Timing:
    """What a step of so many seconds means."""
    counted = cost.measure(training.config)
    batch = training.config.train.batch_size
    flops_per_s = batch * counted.step_flops / seconds
    return Timing(
        kept=counted.kept,
        tokens=counted.tokens,
        images_per_s=batch / seconds,
        ms_per_step=1000 * seconds,
        flops_per_s=flops_per_s,
        peak_fraction=flops_per_s / peak,
        peak_memory_bytes=peak_memory(training.device),
    )


def full_report(training: Training, steps: int, peak: float) -> dict[str, Any]:
    """`Timing`'s keys, and those of `bench train` alone.

    `own_peak_flops_per_s` and `own_peak_fraction` compare with the network's own matrix products;
    `estimated_memory_bytes` is what --dry-run says; `parts_ms` is the breakdown.
    """
    config, device = training.config, training.device
    # Before the steps: what the process has in memory now is part of the estimate.
    processes = training.step.accelerator.num_processes
    estimated = memory.estimate(config, processes, device=device.type).total
    forget_peak(device)
    row = timed(training, steps, peak)
    own = timing.products_peak(products(config), device, dtype_of(config))
    return {
        **row.as_dict(),
        "own_peak_flops_per_s": own,
        "own_peak_fraction": row.flops_per_s / own,
        "estimated_memory_bytes": estimated,
        "parts_ms": training.breakdown(steps),
    }


def dtype_of(config: Config) -> torch.dtype:
    """What a configuration multiplies in."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return names.get(config.train.precision, torch.float32)


def products(config: Config) -> Counter[timing.Shape]:
    """The matrix products of the linear layers in one micro-batch's passes, by shape."""
    with torch.device("meta"):
        parts = road.build(config)
        batch, _ = launch.shares(config.train, 1)
        batch *= parts.objective.copies
        x, t = torch.empty(batch, *parts.codec.shape), torch.empty(batch)
        y = parts.objective.condition.example(batch, "meta")
        with timing.Products() as found, torch.no_grad():
            for route in memory.routes(parts, batch, "meta"):
                parts.backbone(x, t, y, route)
    return found.shapes


def without_route(config: Config) -> Config:
    """A resolved configuration, trained on every token in one plain pass."""
    layer = configuration.stored(
        merge(config.as_dict(), all_tokens(config.objective.name)), "the configuration"
    )
    return road.resolve(configuration.build(layer))


def _watched_batches(batches: Iterator[Batch], clock: Clock) -> Iterator[Batch]:
    while True:
        with clock.part("data"):
            batch = next(batches)
        yield batch


def _random_batches(
    config: Config, parts: road.Parts, size: int, device: torch.device
) -> Iterator[Batch]:
    """The same images and labels again and again, at the positions of a training."""
    images = parts.codec.example(size, device)
    y = parts.objective.condition.example(size, device)
    for position in itertools.count(step=size):
        yield Batch(position, images, y)
