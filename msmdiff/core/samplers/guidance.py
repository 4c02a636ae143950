"""Guidance: how a conditional and an unconditional prediction become one."""

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t, network time, labels) -> the network's output."""


def classifier_free(network: Network, null_class: int, scale: float) -> Network:
    """Classifier-free guidance, out_u + scale (out_c - out_u) (Ho & Salimans 2022), both passes in one batch.

    A scale of 1 is the conditional network, of 0 the unconditional one; both cost one pass.
    """
    if scale == 1:
        return network

    def guided(x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            return network(x, time, None)
        null = torch.full_like(y, null_class)
        if scale == 0:
            return network(x, time, null)
        both = network(torch.cat([x, x]), torch.cat([time, time]), torch.cat([y, null]))
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return guided
