"""What the network's output means, and what the network is fed.

A prediction of another kind is a file of its own (`flow`, `edm`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from msmdiff.core.diffusion.schedules import Schedule, spread
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import register


@dataclass
class Estimate:
    """What a denoiser says of x_t: x0 and eps [B, C, H, W], and the variance of the step where the
    network learns it.

    log_variance is that of one step of the training schedule; a sampler on fewer steps recomputes
    it from `variance`, which lies between the posterior's (0) and beta's (1).
    """

    x0: Tensor
    eps: Tensor
    log_variance: Tensor | None = None
    variance: Tensor | None = None


class Prediction(Protocol):
    """One meaning of the output. x0, eps, x_t and outputs are [B, C, ...], t is [B] or []."""

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is fed: x_t, perhaps scaled, and its time."""

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output."""

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The output -> x0 and eps."""

    def snr_weight(self, snr: Tensor) -> Tensor:
        """What an error of 1 in x0 counts for in the output: the divisor of weights in x0 space."""


class Direct:
    """A prediction by a network that is fed x_t as it is, and the schedule's clock."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, self.schedule.clock(t)

    def scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, to multiply x with."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return spread(alpha, x), spread(sigma, x)


@register("prediction", "eps")
class Eps(Direct):
    """The noise (Ho et al. 2020)."""

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t, x_t)
        return (x_t - sigma * output) / alpha, output

    def snr_weight(self, snr: Tensor) -> Tensor:
        return snr


@register("prediction", "x0")
class X0(Direct):
    """The clean image."""

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t, x_t)
        return output, (x_t - alpha * output) / sigma

    def snr_weight(self, snr: Tensor) -> Tensor:
        return snr.new_ones(snr.shape)


@register("prediction", "v")
class V(Direct):
    """v = alpha eps - sigma x0 (Salimans & Ho 2022), of a variance-preserving schedule.

    Raises UsageError for another schedule, where alpha and sigma are not cosine and sine.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        alpha, sigma = schedule.alpha_sigma(torch.tensor(0.5, dtype=torch.float64, device="cpu"))
        if abs(alpha**2 + sigma**2 - 1) > 1e-6:
            raise UsageError(
                "process.prediction 'v' needs a variance-preserving schedule: use velocity or eps"
            )

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.scales(t, x0)
        return alpha * eps - sigma * x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.scales(t, x_t)
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output

    def snr_weight(self, snr: Tensor) -> Tensor:
        return snr + 1
