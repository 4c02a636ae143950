"""Rectified flow (Liu et al. 2023; Lipman et al. 2023): its schedule and its velocity."""

import torch
from torch import Tensor

from msmdiff.core.diffusion.predictions import Direct
from msmdiff.core.diffusion.schedules import Continuous, spread
from msmdiff.core.registry import register


@register("schedule", "flow")
class Flow(Continuous):
    """Straight lines from the image to the noise: alpha = 1 - t, sigma = t."""

    latest = 0.999  # at 1 nothing is left of x0, and the log-SNR is infinite

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = torch.ones_like(t, dtype=torch.float64)
        return -rate, rate

    def diffusion(self, t: Tensor) -> Tensor:
        """SiT's 2 t (Ma et al. 2024)."""
        return 2 * t.double()

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr.double() / 2)


@register("prediction", "velocity")
class Velocity(Direct):
    """d x_t / dt on the way to the noise: alpha' x0 + sigma' eps, on the flow eps - x0."""

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
        """On the flow: the output's error is that of x0 over t = 1 / (1 + sqrt(SNR))."""
        return (1 + snr.sqrt()) ** 2


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
