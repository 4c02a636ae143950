"""A network that is told how long a step is: the second time of MeanFlow (Geng et al. 2025)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msmdiff.core.backbones.layers import timestep_embedding
from msmdiff.core.errors import UsageError


class IntervalEmbed(nn.Module):
    """Sinusoids of the interval t - r, Linear, SiLU, Linear: what is added to the time's embedding.

    It starts at zero, so that a network which learnt without it goes on as it was.

    Args:
        sinusoids: how many numbers describe an interval.
        width: of the time's embedding.
    """

    def __init__(self, sinusoids: int, width: int) -> None:
        super().__init__()
        self.sinusoids = sinusoids
        self.fc1 = nn.Linear(sinusoids, width)
        self.fc2 = nn.Linear(width, width)

    def initialise(self) -> None:
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, interval: Tensor) -> Tensor:
        """interval [B] in network time -> [B, width]."""
        sinusoids = timestep_embedding(interval, self.sinusoids).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(sinusoids)))


def add_interval(embed: IntervalEmbed | None, time: Tensor, interval: Tensor | None) -> Tensor:
    """The embedding of a time [B, width] with that of the interval [B] that ends below it; None is
    0, which asks for the velocity itself.

    Raises UsageError where a network that knows no intervals is given one.
    """
    if embed is None:
        if interval is not None:
            raise UsageError(
                "this network knows no intervals of time (model.interval_embed=false): few steps "
                "need one that was trained with objective.name meanflow"
            )
        return time
    if interval is None:
        interval = torch.zeros(len(time), device=time.device)
    return time + embed(interval)
