"""`bench sample`: how fast images are drawn, and what the sampler costs beside the bare network."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msmdiff.core import build as road
from msmdiff.core import registry
from msmdiff.core.backbones.routes import compile_blocks
from msmdiff.core.bench import timing
from msmdiff.core.config import Config
from msmdiff.core.model import Model
from msmdiff.core.samplers.times import visited
from msmdiff.core.seeding import SeedNoise


@dataclass
class Sampled:
    """Drawing one batch, measured.

    Attributes:
        images_per_s: without the codec's decoder.
        ms_per_batch: from noise to the last x0.
        evaluations: passes of the network in it, guided ones twice as wide.
        ms_per_evaluation: of the bare network, on the same numbers of images.
        beside_network: what the sampler costs on top of those passes, as a share of them.
    """

    images_per_s: float
    ms_per_batch: float
    evaluations: int
    ms_per_evaluation: float
    beside_network: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Counted:
    """A network that counts its passes and remembers what the last one was given."""

    def __init__(self, network: Any) -> None:
        self.network, self.passes = network, 0
        self.given: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, *given: Any, **options: Any) -> Tensor:
        self.passes += 1
        self.given, self.options = given, options
        return self.network(*given, **options)


@torch.no_grad()
def measure(config: Config, batch: int, device: torch.device, repeats: int = 3) -> Sampled:
    """Draw a batch with a freshly initialised network of a resolved configuration.

    Bare passes and whole drawings take turns, so that whatever else the machine does hits both.
    """
    parts = road.build(config)
    network = Counted(parts.backbone.to(device).eval())
    parts.process.to(device)
    options = config.sample
    if options.compile:
        compile_blocks(parts.backbone, dynamic=False)
    condition = parts.objective.condition
    model = Model(
        backbone=network,
        process=parts.process,
        codec=parts.codec,
        condition=condition,
        config=config,
    )
    schedule = parts.process.schedule
    entry = registry.find("sampler", options.sampler, "sample.sampler")
    times = visited(schedule, options)
    y = condition.example(batch, device)
    noise = SeedNoise(range(batch), parts.codec.shape, device)
    half = partial(torch.autocast, device.type, torch.bfloat16, options.precision == "bf16")

    def draw() -> Tensor:
        x = noise() * schedule.start_std
        with half():
            return entry.make(model.denoiser(y), schedule, x, times, noise, **entry.takes(options))

    network.passes = 0
    draw()
    evaluations = network.passes

    def bare() -> None:
        with half():
            for _ in range(evaluations):
                network.network(*network.given, **network.options)

    found = timing.alternate(bare, draw, device, pairs=repeats, calls=1, warmup=0)
    ratio = found.as_dict()["median"]
    alone = sorted(found.first)[len(found.first) // 2]
    return Sampled(
        images_per_s=batch / (alone * ratio),
        ms_per_batch=1000 * alone * ratio,
        evaluations=evaluations,
        ms_per_evaluation=1000 * alone / evaluations,
        beside_network=ratio - 1,
    )
