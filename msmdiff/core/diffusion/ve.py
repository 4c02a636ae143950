"""Variance-exploding noise: x_t = x0 + sigma(t) eps, where the image never fades.

`ve` is that of Song et al. 2021; EDM's is a file of its own (`edm`).
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.schedules import Continuous
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register


class Exploding(Continuous):
    """What such schedules share: alpha = 1, and a sigma(t) that rises from sigma_min > 0 at t = 0.

    At 0 itself, where no network is asked, there is no noise.

    Raises UsageError where sigma_min is not below sigma_max.
    """

    def __init__(self, timesteps: int, *, sigma_min: float, sigma_max: float) -> None:
        super().__init__(timesteps)
        if sigma_min >= sigma_max:
            raise UsageError(
                f"process.sigma_min {sigma_min:g} must be less than process.sigma_max {sigma_max:g}"
            )
        self.start_std = sigma_max

    def sigma(self, t: Tensor) -> Tensor:
        """The noise at t of any shape, in t's dtype; at 0 its limit from above."""
        raise NotImplementedError

    def sigma_rate(self, t: Tensor) -> Tensor:
        """d sigma / dt at t, float64."""
        raise NotImplementedError

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.where(t == 0, 0.0, self.sigma(t))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.sigma_rate(t)
        return torch.zeros_like(rate), rate

    def diffusion(self, t: Tensor) -> Tensor:
        """d sigma^2 / dt (Song et al. 2021, eq. 9)."""
        return 2 * self.alpha_sigma(t.double())[1] * self.sigma_rate(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * self.alpha_sigma(t)[1].log()


class VeOptions(Options):
    sigma_min: float = Field(0.01, gt=0, description="The noise at t = 0, where solvers stop.")
    sigma_max: float = Field(
        50.0,
        gt=0,
        description="The noise at t = 1, where sampling starts: about the largest distance between "
        "two images.",
    )


@register("schedule", "ve", VeOptions)
class Ve(Exploding):
    """The variance-exploding SDE: sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021,
    appendix C): uniform times are uniform in ln sigma.
    """

    earliest = 1e-5  # as published

    def __init__(self, timesteps: int, *, sigma_min: float, sigma_max: float) -> None:
        super().__init__(timesteps, sigma_min=sigma_min, sigma_max=sigma_max)
        self._low, self._rise = math.log(sigma_min), math.log(sigma_max / sigma_min)

    def sigma(self, t: Tensor) -> Tensor:
        return (self._low + t * self._rise).exp()

    def sigma_rate(self, t: Tensor) -> Tensor:
        return self._rise * self.sigma(t.double())

    def time_at(self, log_snr: Tensor) -> Tensor:
        return (-log_snr.double() / 2 - self._low) / self._rise
