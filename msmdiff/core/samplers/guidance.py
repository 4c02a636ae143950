"""Guidance: how a prediction and one to get away from become one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.condition import Condition
from msmdiff.core.diffusion.process import Network, call
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import SampleConfig

Strength = Callable[[Tensor], Tensor]
"""Times -> the guidance scale at each."""


@dataclass
class Guided:
    """A network whose output is guided; called like the network itself.

    out_u + scale (out_c - out_u) (Ho & Salimans 2022), both passes in one batch. A scale of 1 is
    the conditional network, of 0 the unconditional one; both cost one pass.

    Attributes:
        condition: knows the null that stands for no label.
        scale: one number, or [B].
        channels: guide the first so many output channels, and take the others from the conditional
            pass. The published samplers of DiT, MDT and EDT guide 3, also where the latents have 4.
            A learned variance, behind the C channels of the prediction, is never guided.
        guide: a weaker network in the unconditional one's place (autoguidance, Karras et al. 2024),
            on the same y.
        weak: draws the route of the other pass: without the middle of the network, on the null
            (SPRINT's path drop); else with fewer tokens, on the same y (sparse guidance).

    Raises UsageError for a guide whose output has another shape.
    """

    network: Network
    condition: Condition
    scale: float | Tensor
    channels: int | None = None
    guide: Network | None = None
    weak: Callable[[], Any] | None = None

    def __call__(
        self,
        x: Tensor,
        time: Tensor,
        y: Tensor | None = None,
        route: Any = None,
        interval: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, H, W], time [B], y as the condition has it, interval [B] or None -> [B, C or 2C,
        H, W].
        """
        scale = self.scale
        fixed = isinstance(scale, int | float)
        plain = self.guide is None and self.weak is None
        if (fixed and scale == 1) or (y is None and plain):
            return call(self.network, x, time, y, route, interval=interval)
        if plain and fixed and scale == 0 and self.channels is None:
            assert y is not None
            nulls = self.condition.nulls(y)
            return call(self.network, x, time, nulls, route, interval=interval)
        conditional, other = self._both(x, time, y, route, interval)
        strength = scale
        if isinstance(scale, Tensor):
            strength = scale.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        mixed = other + strength * (conditional - other)
        guided = min(self.channels or x.shape[1], x.shape[1])
        if guided == conditional.shape[1]:
            return mixed
        return torch.cat([mixed[:, :guided], conditional[:, guided:]], dim=1)

    def _both(
        self, x: Tensor, time: Tensor, y: Tensor | None, route: Any, interval: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The conditional output, and the one to get away from."""
        if self.weak is not None:
            weak = self.weak()
            told = y if y is None or weak.keep is not None else self.condition.nulls(y)
            whole = call(self.network, x, time, y, route, interval=interval)
            return whole, call(self.network, x, time, told, weak, interval=interval)
        if self.guide is None:
            assert y is not None
            out = call(
                self.network,
                torch.cat([x, x]),
                torch.cat([time, time]),
                torch.cat([y, self.condition.nulls(y)]),
                route,
                interval=None if interval is None else torch.cat([interval, interval]),
            )
            conditional, other = out.chunk(2)
            return conditional, other
        conditional = call(self.network, x, time, y, route, interval=interval)
        other = call(self.guide, x, time, y, route, interval=interval)
        if conditional.shape != other.shape:
            raise UsageError(
                f"the guide gives {other.shape[1]} channels, the network {conditional.shape[1]}"
            )
        return conditional, other


# ------------------------------------------------------------------ schedules of the scale


@register("guidance", "constant")
def constant(scale: float) -> Callable[[Tensor], Tensor]:
    """The same scale at all times."""
    return lambda left: torch.full_like(left, scale)


@register("guidance", "linear")
def linear(scale: float) -> Callable[[Tensor], Tensor]:
    """From none at pure noise to the scale at the image, evenly."""
    return lambda left: 1 + (scale - 1) * left


class PowerOptions(Options):
    cfg_power: float | None = Field(
        None, gt=0, description="The exponent of the schedule (MDT takes 4)."
    )


@register("guidance", "power_cosine", PowerOptions)
def power_cosine(scale: float, *, cfg_power: float | None) -> Callable[[Tensor], Tensor]:
    """MDT's schedule (Gao et al. 2023): none at pure noise, rising the later the larger the power.

    Raises UsageError without the power.
    """
    if cfg_power is None:
        raise UsageError("sample.cfg_schedule power_cosine needs sample.cfg_power (MDT: 4)")
    power = cfg_power

    def strength(left: Tensor) -> Tensor:
        return 1 + (scale - 1) * (1 - torch.cos(math.pi * left.float() ** power)) / 2

    return strength


def schedule(options: SampleConfig, noise: Schedule) -> Strength:
    """The scale at process times t of any shape: its schedule, and 1 outside `cfg_interval`.

    Registered schedules are functions of what is left of the way to pure noise, 1 - k / T, at the
    network's time k. Raises UsageError for an interval that falls.
    """
    entry = registry.find("guidance", options.cfg_schedule, "sample.cfg_schedule")
    over_time = entry.make(options.cfg_scale, **entry.takes(options))
    interval = options.cfg_interval
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise UsageError(
            f"sample.cfg_interval {interval} must be two rising noise levels sigma / alpha, such "
            "as 0.3, 5"
        )

    def strength(t: Tensor) -> Tensor:
        value = over_time(1 - noise.clock(t) / noise.timesteps)
        if interval is None:
            return value
        level = torch.exp(-noise.log_snr(t) / 2)
        return torch.where((level >= interval[0]) & (level <= interval[1]), value, 1.0)

    return strength
