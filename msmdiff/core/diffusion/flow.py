"""Rectified flow (Liu et al. 2023; Lipman et al. 2023): its schedule and its velocity."""

import math

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.predictions import Direct
from msmdiff.core.diffusion.schedules import Continuous, Schedule, spread
from msmdiff.core.registry import Options, register


class FlowOptions(Options):
    noise_scale: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="The standard deviation of the noise at t = 1; JiT takes 2 at 512 pixels.",
    )


@register("schedule", "flow", FlowOptions)
class Flow(Continuous):
    """Straight lines from the image to noise of deviation s: alpha = 1 - t, sigma = s t."""

    latest = 0.999  # at 1 nothing is left of x0, and the log-SNR is infinite

    def __init__(self, timesteps: int, *, noise_scale: float) -> None:
        super().__init__(timesteps)
        self.start_std = noise_scale

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, self.start_std * t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = torch.ones_like(t, dtype=torch.float64)
        return -rate, self.start_std * rate

    def diffusion(self, t: Tensor) -> Tensor:
        """SiT's 2 t (Ma et al. 2024), of noise of deviation s times s^2."""
        return 2 * self.start_std**2 * t.double()

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t) - math.log(self.start_std))

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2 - math.log(self.start_std))


@register("prediction", "velocity")
class Velocity(Direct):
    """d x_t / dt on the way to the noise: alpha' x0 + sigma' eps, on the flow eps - x0."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.noise_scale = schedule.start_std if isinstance(schedule, Flow) else 1.0

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        of_x0, of_eps = (spread(rate, x0) for rate in self.schedule.rates(t))
        return of_x0 * x0 + of_eps * eps

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t, x_t)
        of_x0, of_eps = (spread(rate, x_t) for rate in self.schedule.rates(t))
        both = alpha * of_eps - sigma * of_x0  # the determinant of x_t, output in x0, eps
        x0 = (of_eps * x_t - sigma * output) / both
        eps = (alpha * output - of_x0 * x_t) / both
        return x0, eps

    def snr_weight(self, snr: Tensor) -> Tensor:
        """On the flow: the output's error is that of x0 over t = 1 / (1 + s sqrt(SNR))."""
        return (1 + self.noise_scale * snr.sqrt()) ** 2


@register("prediction", "velocity_to_image")
class VelocityToImage(Velocity):
    """SiT's (Ma et al. 2024): the velocity the other way, from the noise, where its clock shows 0,
    to the image, where it shows 1.
    """

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, 1 - t.float()

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return -super().target(x0, eps, t)

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return super().split(-output, x_t, t)
