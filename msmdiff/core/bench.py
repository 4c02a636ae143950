"""Timing done right: warm-up, synchronisation, medians, and FLOP/s against what the machine can do."""

import statistics
import time
from dataclasses import asdict, dataclass

import torch

from msmdiff.core import build as road
from msmdiff.core import machine
from msmdiff.core.config import Config
from msmdiff.core.diffusion.codecs import VaeCodec
from msmdiff.core.seeding import stream
from msmdiff.core.training import cost, optim
from msmdiff.core.training.ema import Averages
from msmdiff.core.training.meter import peak_memory


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


def training_step(
    config: Config, device: torch.device, steps: int, peak: float, warmup: int = 2
) -> Timing:
    """Time whole optimiser steps (loss, backward, update, averages) of a resolved configuration on
    random images.
    """
    machine.prepare(config.train.threads)
    parts = road.build(config)
    parts.process.to(device)
    network = parts.backbone.to(device)
    network.gradient_checkpointing = config.train.gradient_checkpointing
    averages = Averages(network, config.ema)
    optimizer = optim.build(config.optim, network.parameters())
    if config.train.compile:
        network.compile()
    batch, size = config.train.batch_size, config.data.image_size
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    if isinstance(
        parts.codec, VaeCodec
    ):  # as training reads them: means and deviations, packed before
        channels, height, width = parts.codec.shape
        images = torch.rand(batch, 2 * channels, height, width, dtype=torch.float16, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device) if network.num_classes else None
    if context := road.context_shape(config):
        labels = torch.randn(batch, *context, device=device)
        parts.objective.null = torch.zeros(context, device=device)
    half = config.train.precision == "bf16"

    def step(number: int) -> None:
        x0 = parts.codec.encode(images)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            terms = parts.objective(
                network, x0, labels, lambda purpose, place=device: stream(place, 0, purpose, number)
            )
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averages.update()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _median_seconds(step, device, steps, warmup)
    counted = cost.measure(config)
    flops_per_s = batch * counted.step_flops / seconds
    return Timing(
        kept=counted.kept,
        tokens=counted.tokens,
        images_per_s=batch / seconds,
        ms_per_step=1000 * seconds,
        flops_per_s=flops_per_s,
        peak_fraction=flops_per_s / peak,
        peak_memory_bytes=peak_memory(device),
    )


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what a step is measured against."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _median_seconds(lambda _: a @ a, device, steps=5, warmup=2)


def _median_seconds(function, device: torch.device, steps: int, warmup: int) -> float:
    times = []
    for number in range(warmup + steps):
        _synchronise(device)
        started = time.perf_counter()
        function(number)
        _synchronise(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[warmup:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
