"""Guidance: how a conditional and an unconditional prediction become one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t, network time, labels) -> the network's output."""

Strength = Callable[[Tensor], Tensor]
"""Network time [B] -> the guidance scale of each image [B]."""


def classifier_free(
    network: Network, null: int | Tensor, scale: float | Strength, channels: int | None = None
) -> Network:
    """Classifier-free guidance, out_u + scale (out_c - out_u) (Ho & Salimans 2022), both passes in one batch.

    A scale of 1 is the conditional network, of 0 the unconditional one; both cost one pass.

    Args:
        null: the class that stands for no label, or the features of an empty text [tokens, width].
        scale: one number, or a function of time.
        channels: guide the first so many output channels, and take the others from the conditional pass. The
            published samplers of DiT, MDT and EDT guide 3, also where the latents have 4.
    """
    if scale == 1:
        return network

    def guided(x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            return network(x, time, None)
        empty = torch.full_like(y, null) if isinstance(null, int) else null.to(y).expand_as(y)
        if scale == 0 and channels is None:
            return network(x, time, empty)
        conditional, unconditional = network(torch.cat([x, x]), torch.cat([time, time]), torch.cat([y, empty])).chunk(2)
        strength = scale(time).view(-1, *[1] * (x.ndim - 1)).to(x.dtype) if callable(scale) else scale
        mixed = unconditional + strength * (conditional - unconditional)
        return mixed if channels is None else torch.cat([mixed[:, :channels], conditional[:, channels:]], dim=1)

    return guided


def power_cosine(scale: float, power: float, timesteps: int = 1000) -> Strength:
    """MDT's schedule (Gao et al. 2023): none at t = T, rising to `scale` at t = 0, the later the larger `power`."""

    def strength(time: Tensor) -> Tensor:
        return 1 + (scale - 1) * (1 - torch.cos(math.pi * (1 - time.float() / timesteps) ** power)) / 2

    return strength
