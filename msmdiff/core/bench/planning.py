"""`bench plan`: what a training would cost on GPUs that are not at hand."""

from dataclasses import asdict, dataclass
from typing import Any

from msmdiff.core.config import Config
from msmdiff.core.errors import UsageError
from msmdiff.core.training import cost, launch, memory


@dataclass(frozen=True)
class Gpu:
    """A device, by its data sheet.

    Attributes:
        title: for people.
        tflops: of dense bf16 products with fp32 sums, 10^12 a second.
        memory_gib: of the device.
    """

    title: str
    tflops: float
    memory_gib: float


GPUS: dict[str, Gpu] = {
    "a100": Gpu("NVIDIA A100 80 GB", 312, 79.2),
    "a100-40": Gpu("NVIDIA A100 40 GB", 312, 39.4),
    "h100": Gpu("NVIDIA H100 SXM", 989, 79.2),
    "h200": Gpu("NVIDIA H200", 989, 139.8),
    "b200": Gpu("NVIDIA B200", 2250, 178.0),
    "l40s": Gpu("NVIDIA L40S", 362, 44.4),
    "l4": Gpu("NVIDIA L4", 121, 22.0),
    "a10": Gpu("NVIDIA A10", 125, 22.0),
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 71, 23.6),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 165, 23.5),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 210, 31.3),
}

SHARE = 0.35
"""Of the data sheet's products that a large training reaches, recomputed blocks counted: published
on an A100 were 0.37 (U-ViT-H/2) and 0.33 (DiT-XL/2); see docs/benchmarks.md.
"""

ROOM = 0.95
"""Share of a device's memory that a process can fill."""


@dataclass
class Plan:
    """A training on some GPUs.

    Attributes:
        gpu, gpus: which and how many.
        batch_per_gpu: images of a step on each.
        flops_per_step: on all of them, recomputed blocks included.
        share: of the data sheet's products a second that was assumed.
        ms_per_step, images_per_s: all GPUs together.
        steps, hours, gpu_hours: of the whole training.
        memory_gib: estimated, of each process; `fits` in the device or not.
        advice: what to change where it does not fit; empty where it does.
    """

    gpu: str
    gpus: int
    batch_per_gpu: int
    flops_per_step: float
    share: float
    ms_per_step: float
    images_per_s: float
    steps: int
    hours: float
    gpu_hours: float
    memory_gib: float
    fits: bool
    advice: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make(
    config: Config, gpu: str, gpus: int = 1, share: float = SHARE, sharded: bool = False
) -> Plan:
    """Plan a resolved configuration with its precision chosen; nothing is allocated.

    Raises UsageError for an unknown GPU, and a batch that does not divide among the GPUs.
    """
    if gpu not in GPUS:
        raise UsageError(f"--gpu {gpu}: choose one of {', '.join(GPUS)}")
    device = GPUS[gpu]
    launch.shares(config.train, gpus)
    batch = config.train.batch_size
    flops = batch * flops_per_image(config)
    seconds = flops / (gpus * device.tflops * 1e12 * share)
    hours = seconds * config.train.steps / 3600
    taken = memory.estimate(config, gpus, sharded, "cuda").total / 2**30
    fits = taken <= ROOM * device.memory_gib
    return Plan(
        gpu=device.title,
        gpus=gpus,
        batch_per_gpu=batch // gpus,
        flops_per_step=flops,
        share=share,
        ms_per_step=1000 * seconds,
        images_per_s=batch / seconds,
        steps=config.train.steps,
        hours=hours,
        gpu_hours=hours * gpus,
        memory_gib=taken,
        fits=fits,
        advice="" if fits else _advice(config, device, gpus, sharded),
    )


def flops_per_image(config: Config) -> float:
    """`cost.flops_per_image`, with the blocks that gradient checkpointing computes again."""
    every = int(config.train.gradient_checkpointing)
    again = 1 / (3 * every) if every else 0.0
    return cost.flops_per_image(config) * (1 + again)


def _advice(config: Config, device: Gpu, gpus: int, sharded: bool) -> str:
    """The first change with which a training fits a device."""
    each = config.train.batch_size // gpus
    tried = [(each, True)] + [(each // n, on) for n in (2, 4, 8, 16, 32) for on in (False, True)]
    for micro, checkpointing in tried:
        if micro < 1 or each % micro:
            continue
        changed = config.model_copy(deep=True)
        changed.train.micro_batch_size = micro
        if checkpointing:
            changed.train.gradient_checkpointing = True
        taken = memory.estimate(changed, gpus, sharded, "cuda").total / 2**30
        if taken <= ROOM * device.memory_gib:
            keys = [f"train.micro_batch_size={micro}"] if micro < each else []
            keys += ["train.gradient_checkpointing=true"] if checkpointing else []
            return f"{' and '.join(keys)} would take {taken:.1f} GiB"
    more = "a larger device" if sharded or gpus == 1 else "sharding (FSDP), or a larger device"
    return f"no smaller micro-batch fits: take {more}"
