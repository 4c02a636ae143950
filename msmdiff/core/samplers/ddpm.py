"""Ancestral sampling (Ho et al. 2020, eq. 6-7) on any falling sequence of times."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.process import Denoiser, Noise
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.registry import Options, register
from msmdiff.core.samplers.times import Plan, planned


class DdpmOptions(Options):
    variance: Literal["small", "large"] = Field(
        "small", description="The variance of a step: the posterior's (`small`) or beta (`large`)."
    )


def posterior(schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q(x_s | x_t, x0) for each step of times [S + 1]: the mean's factors of x0 and of x_t, and
    the logarithms of its variance and of the variance of q(x_t | x_s); all [S] float64.

    With a = alpha_t / alpha_s and b = sigma_t^2 - a^2 sigma_s^2, the mean is
    (alpha_s b x0 + a sigma_s^2 x_t) / sigma_t^2 and the variance b sigma_s^2 / sigma_t^2. A last
    step to the clean image has none; for its logarithm it is given the step's before, as ADM does.
    """
    alpha, sigma = schedule.alpha_sigma(times)
    ratio = alpha[:-1] / alpha[1:]
    remaining = (sigma[1:] / sigma[:-1]) ** 2
    # The share of the noise at t that came in since s, b / sigma_t^2.
    fresh = 1 - ratio**2 * remaining
    added = sigma[:-1] ** 2 * fresh
    variance = added * remaining
    if times[-1] == 0:
        variance[-1] = variance[-2] if len(variance) > 1 else added[-1]
    return alpha[1:] * fresh, ratio * remaining, variance.log(), added.log()


@register("sampler", "ddpm", DdpmOptions)
@planned(Plan(default="even"))
def sample(
    denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise, *, variance: str
) -> Tensor:
    """Ancestral sampling.

    x [B, C, H, W] at times[0] -> x at times[-1]. The variance of a step is the posterior's (small)
    or beta (large), or, where the network learns it, between the two (Nichol & Dhariwal 2021, eq.
    15). A step to t = 0 adds no noise.
    """
    from_x0, from_x, low, high = (table.tolist() for table in posterior(schedule, times))
    fixed = high if variance == "large" else low
    noisy = (times[1:] > 0).tolist()
    for i, t in enumerate(times[:-1]):
        estimate = denoise(x, t)
        x = from_x0[i] * estimate.x0 + from_x[i] * x
        if noisy[i]:
            log_variance = torch.tensor(fixed[i], dtype=x.dtype)
            if estimate.variance is not None:
                log_variance = low[i] + (high[i] - low[i]) * estimate.variance
            x = x + (log_variance / 2).exp() * noise()
    return x
