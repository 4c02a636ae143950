"""EDM's sampler (Karras et al. 2022, algorithm 2): Heun in the noise level, with churn.

Of x / alpha and s = sigma / alpha the probability flow is d(x / alpha) / ds = eps, whatever the
schedule (eq. 4 there): that is the variable in which its steps are taken.
"""

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.process import Denoiser, Noise
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.registry import Options, register
from msmdiff.core.samplers.times import Plan, planned


class EdmSamplerOptions(Options):
    s_churn: float = Field(
        0.0,
        ge=0,
        le=100_000,
        description="How much new noise is added over all steps; 0 is deterministic.",
    )
    s_tmin: float = Field(
        0.0, ge=0, description="Noise is added from this level sigma / alpha on (S_tmin)."
    )
    s_tmax: float | None = Field(
        None, gt=0, description="And up to this level (S_tmax); null has no limit."
    )
    s_noise: float = Field(
        1.0,
        gt=0,
        le=10,
        description="The deviation of that noise (S_noise); a little above 1 makes up for detail "
        "that a network loses.",
    )


@dataclass(frozen=True)
class _Level:
    """A noise level s, the time that has it, and alpha there."""

    s: float
    time: Tensor
    alpha: float


@register("sampler", "edm", EdmSamplerOptions)
@planned(Plan(default="karras"))
def sample(
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    s_churn: float,
    s_tmin: float,
    s_tmax: float | None,
    s_noise: float,
) -> Tensor:
    """Second-order steps in sigma / alpha, two evaluations each; noisy with s_churn above 0.

    x [B, C, H, W] at times[0] -> x at times[-1]. A step to t = 0 is Euler's. The level is raised by
    a factor 1 + min(s_churn / steps, sqrt(2) - 1), though never beyond the first one. Without churn
    `noise` is never called.
    """
    levels = _levels(schedule, times)
    gamma = min(s_churn / max(len(levels) - 1, 1), math.sqrt(2) - 1)
    limit = math.inf if s_tmax is None else s_tmax
    raised = torch.tensor(
        [
            min(level.s * (1 + gamma), levels[0].s) if s_tmin <= level.s <= limit else level.s
            for level in levels[:-1]
        ],
        dtype=torch.float64,
    )
    churned = _levels(schedule, schedule.time_at(-2 * raised.log()))
    y = x / levels[0].alpha
    for i, now in enumerate(levels[:-1]):
        after = levels[i + 1]
        if raised[i].item() > now.s:
            y = y + s_noise * math.sqrt(raised[i].item() ** 2 - now.s**2) * noise()
            now = churned[i]
        slope = _slope(denoise, y, now)
        ahead = y + (after.s - now.s) * slope
        if after.s > 0:
            ahead = y + (after.s - now.s) / 2 * (slope + _slope(denoise, ahead, after))
        y = ahead
    return y * levels[-1].alpha


def _slope(denoise: Denoiser, y: Tensor, level: _Level) -> Tensor:
    """d(x / alpha) / ds at y = x / alpha, [B, C, H, W]."""
    return (y - denoise(level.alpha * y, level.time).x0) / level.s


def _levels(schedule: Schedule, times: Tensor) -> list[_Level]:
    alpha, sigma = schedule.alpha_sigma(times)
    return [
        _Level(s, time, a)
        for s, time, a in zip((sigma / alpha).tolist(), times, alpha.tolist(), strict=True)
    ]
