"""`bench fid`: how fast a feature network reads images, and a distance is computed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from msmdiff.core.bench import timing
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.frechet import Gaussian, frechet_distance


@dataclass
class Scored:
    """A distance's parts, measured.

    Attributes:
        features: the network's name.
        images_per_s: through it, resizing included.
        frechet_s: of one distance between Gaussians of its width.
        minutes_for_50k: both, for 50,000 images that are in memory.
    """

    features: str
    images_per_s: float
    frechet_s: float
    minutes_for_50k: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(network: Features, image_size: int, batch: int, device: torch.device) -> Scored:
    """Time a feature network on random images, and the distance between two random Gaussians."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, image_size, image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    seconds = timing.median_seconds(lambda: network(images)[0].cpu(), device, steps=5, warmup=2)
    # As many as the width or fewer would take a shorter way.
    drawn = torch.randn(2, 2 * network.width, network.width, generator=generator)
    first, second = (Gaussian.fit(features) for features in drawn)
    cpu = torch.device("cpu")
    distance = timing.median_seconds(
        lambda: frechet_distance(first, second), cpu, steps=1, warmup=0
    )
    total = 50_000 * seconds / batch + distance
    return Scored(network.name, batch / seconds, distance, total / 60)
