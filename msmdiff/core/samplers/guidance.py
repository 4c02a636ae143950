"""Guidance: how a conditional prediction and one to get away from become one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.process import Process
from msmdiff.core.errors import UsageError

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t, network time, labels) -> the network's output."""

Strength = Callable[[Tensor], Tensor]
"""Times -> the guidance scale at each."""


def combine(
    network: Network,
    x: Tensor,
    time: Tensor,
    y: Tensor | None,
    null: int | Tensor,
    scale: float | Tensor,
    channels: int | None = None,
    guide: Network | None = None,
) -> Tensor:
    """out_u + scale (out_c - out_u) (Ho & Salimans 2022), both passes in one batch.

    A scale of 1 is the conditional network, of 0 the unconditional one; both cost one pass.

    Args:
        x, time, y: [B, C, H, W], [B], and classes [B] or the features of a text [B, tokens, width]
            or None.
        null: the class that stands for no label, or the features of an empty text [tokens, width].
        scale: one number, or [B].
        channels: guide the first so many output channels, and take the others from the conditional
            pass. The published samplers of DiT, MDT and EDT guide 3, also where the latents have 4.
            A learned variance, behind the C channels of the prediction, is never guided.
        guide: a weaker network in the unconditional one's place (autoguidance, Karras et al. 2024),
            on the same y.

    Raises UsageError for a guide whose output has another shape.
    """
    fixed = isinstance(scale, int | float)
    if (fixed and scale == 1) or (y is None and guide is None):
        return network(x, time, y)
    if guide is not None:
        conditional, other = network(x, time, y), guide(x, time, y)
        if conditional.shape != other.shape:
            raise UsageError(
                f"the guide gives {other.shape[1]} channels, the network {conditional.shape[1]}"
            )
    else:
        assert y is not None
        empty = torch.full_like(y, null) if isinstance(null, int) else null.to(y).expand_as(y)
        if fixed and scale == 0 and channels is None:
            return network(x, time, empty)
        conditional, other = network(
            torch.cat([x, x]), torch.cat([time, time]), torch.cat([y, empty])
        ).chunk(2)
    strength = (
        scale.view(-1, *[1] * (x.ndim - 1)).to(x.dtype) if isinstance(scale, Tensor) else scale
    )
    mixed = other + strength * (conditional - other)
    guided = min(channels or x.shape[1], x.shape[1])
    if guided == conditional.shape[1]:
        return mixed
    return torch.cat([mixed[:, :guided], conditional[:, guided:]], dim=1)


def power_cosine(scale: float, power: float, timesteps: int = 1000) -> Strength:
    """MDT's schedule (Gao et al. 2023): none at t = T, rising to `scale` at t = 0, the later the
    larger `power`.
    """

    def strength(time: Tensor) -> Tensor:
        return (
            1 + (scale - 1) * (1 - torch.cos(math.pi * (1 - time.float() / timesteps) ** power)) / 2
        )

    return strength


def schedule(options: SampleConfig, process: Process) -> Strength:
    """The scale at process times t of any shape: its schedule, and 1 outside `cfg_interval`.

    Raises UsageError for a power-cosine schedule without its power, or an interval that falls.
    """
    scale, timesteps, interval = options.cfg_scale, process.timesteps, options.cfg_interval
    over_time: Strength = lambda time: torch.full_like(time, scale)  # noqa: E731
    if options.cfg_schedule == "linear":
        over_time = lambda time: 1 + (scale - 1) * (1 - time / timesteps)  # noqa: E731
    elif options.cfg_schedule == "power_cosine":
        if options.cfg_power is None:
            raise UsageError("sample.cfg_schedule power_cosine needs sample.cfg_power (MDT: 4)")
        over_time = power_cosine(scale, options.cfg_power, timesteps)
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise UsageError(
            f"sample.cfg_interval {interval} must be two rising noise levels sigma / alpha, "
            "such as 0.3, 5"
        )

    def strength(t: Tensor) -> Tensor:
        value = over_time(process.model_time(t))
        if interval is None:
            return value
        level = torch.exp(-process.log_snr(t) / 2)
        return torch.where((level >= interval[0]) & (level <= interval[1]), value, 1.0)

    return strength
