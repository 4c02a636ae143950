"""EDM (Karras et al. 2022): alpha = 1, noise up to 80 deviations, and a preconditioned network."""

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.schedules import Schedule, spread
from msmdiff.core.diffusion.ve import Exploding
from msmdiff.core.registry import Options, register


class EdmOptions(Options):
    sigma_min: float = Field(0.002, gt=0, description="The noise at t = 0, where solvers stop.")
    sigma_max: float = Field(80.0, gt=0, description="The noise at t = 1, where sampling starts.")
    rho: float = Field(
        7.0,
        ge=0.1,
        le=1000,
        description="The exponent of the schedule: even times are even in sigma^(1/rho).",
    )


@register("schedule", "edm", EdmOptions)
class Edm(Exploding):
    """alpha = 1, sigma(t)^(1/rho) linear in t: an even grid of t is EDM's own (eq. 5)."""

    earliest = 1e-6  # sigma_min

    def __init__(self, timesteps: int, *, sigma_min: float, sigma_max: float, rho: float) -> None:
        super().__init__(timesteps, sigma_min=sigma_min, sigma_max=sigma_max)
        self.rho = rho
        self._low, self._high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)

    def _root(self, t: Tensor) -> Tensor:
        return self._low + t * (self._high - self._low)

    def sigma(self, t: Tensor) -> Tensor:
        return self._root(t) ** self.rho

    def sigma_rate(self, t: Tensor) -> Tensor:
        return self.rho * (self._high - self._low) * self._root(t.double()) ** (self.rho - 1)

    def time_at(self, log_snr: Tensor) -> Tensor:
        root = torch.exp(-log_snr.double() / (2 * self.rho))
        return (root - self._low) / (self._high - self._low)


class PreconditionOptions(Options):
    sigma_data: float = Field(0.5, gt=0, description="The standard deviation of the data.")


@register("prediction", "edm", PreconditionOptions)
class Preconditioned:
    """x0 = c_skip x + c_out F(c_in x, ln(sigma) / 4) (eq. 7), of x = x_t / alpha."""

    def __init__(self, schedule: Schedule, *, sigma_data: float) -> None:
        self.schedule, self.data = schedule, sigma_data

    def _scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """alpha, sigma of x_t / alpha, and c_skip, c_out, c_in."""
        alpha, noise = self.schedule.alpha_sigma(t)
        sigma = noise / alpha
        total = sigma**2 + self.data**2
        root = total.sqrt()
        scales = (alpha, sigma, self.data**2 / total, sigma * self.data / root, 1 / root)
        return tuple(spread(scale, x) for scale in scales)

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, _, _, _, c_in = self._scales(t, x_t)
        return c_in * x_t / alpha, -self.schedule.log_snr(t).float() / 8

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        _, sigma, c_skip, c_out, _ = self._scales(t, x0)
        return (x0 - c_skip * (x0 + sigma * eps)) / c_out

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, c_skip, c_out, _ = self._scales(t, x_t)
        x0 = c_skip * x_t / alpha + c_out * output
        return x0, (x_t / alpha - x0) / sigma

    def snr_weight(self, snr: Tensor) -> Tensor:
        """The output's error is that of x0 over c_out: `uniform` is EDM's own weighting."""
        return snr + 1 / self.data**2
