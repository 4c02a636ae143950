"""How much signal and noise there is at time t: x_t = alpha(t) x0 + sigma(t) eps.

Time is a float in [0, 1]: 0 is the clean image. Here are the variance-preserving schedules,
alpha^2 + sigma^2 = 1; a schedule of another kind is a file of its own (`flow`, `ve`, `edm`).
"""

import math
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register


class Schedule(Protocol):
    """What samplers and losses ask. Times may have any shape; float64 in gives float64 out.

    Attributes:
        timesteps: training steps of a table, or how finely samplers may step.
        latest, earliest: where sampling starts, and where solvers stop by default.
        start_std: deviation of x at `latest`.
    """

    timesteps: int
    latest: float
    earliest: float
    start_std: float

    def to(self, device: torch.device | str) -> Self:
        """Put what it computes with on a device."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, in t's shape and dtype."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha / dt and d sigma / dt at t, float64: dx/dt = alpha' x0 + sigma' eps along the
        probability flow, which has no singular point where alpha or sigma ends.
        """

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)^2 of the reverse SDE dx = (alpha' x0 + sigma' eps + g^2 eps / (2 sigma)) dt + g dw,
        float64.
        """

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t, in t's dtype; +inf where there is no noise."""

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, float64; log_snr lies on the CPU."""

    def clock(self, t: Tensor) -> Tensor:
        """What a network is fed as the time, float32."""

    def uniform_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n uniform training times [n], float32, on the generator's device."""

    def times_of(self, u: Tensor) -> Tensor:
        """Numbers u [n] in [0, 1) -> the training times at these quantiles, float32."""


# ------------------------------------------------------------------ tables of betas


def linear_betas(timesteps: int) -> np.ndarray:
    """DDPM's schedule, 1e-4..0.02 scaled by 1000/T (Ho et al. 2020, section 4; Dhariwal & Nichol
    2021).
    """
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64)


def scaled_linear_betas(timesteps: int) -> np.ndarray:
    """Stable Diffusion's schedule, linear in the square root of beta (Rombach et al. 2022)."""
    return np.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=np.float64) ** 2


def cosine_betas(timesteps: int, shift_size: int | None = None) -> np.ndarray:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17) with betas clipped at 0.999.

    `shift_size` d moves the log-SNR by 2 log(64 / d), which keeps the noise per visible detail of a
    64-pixel image (Hoogeboom et al. 2023, "simple diffusion", section 3.1).
    """
    u = np.linspace(0, timesteps, timesteps + 1, dtype=np.float64) / timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    if shift_size is not None:
        odds = alpha_bar / (1 - alpha_bar) * (64 / shift_size) ** 2
        alpha_bar = odds / (1 + odds)
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)


class Table:
    """A schedule of T training steps; the only kind with a posterior between two of them.

    The grid is t = k / T, where k = 1..T is the training index plus one, so that the published
    integer index is `round(t T) - 1`. Index 0 is the clean image, which no network is trained on.

    Args:
        betas: [T] float64, the noise added at each step.
        first_step: what the network is fed at the first step, 0 or 1.
    """

    latest = 1.0
    start_std = 1.0

    def __init__(self, betas: np.ndarray, first_step: int = 0) -> None:
        self.timesteps = len(betas)
        self.first_step = first_step
        self.alpha_bar = torch.from_numpy(np.concatenate([[1.0], np.cumprod(1 - betas)]))
        self._tables = {self.alpha_bar.device: self.alpha_bar}

    @property
    def earliest(self) -> float:
        """The first training step."""
        return 1 / self.timesteps

    def to(self, device: torch.device | str) -> Self:
        """Put a copy of the float64 table on a device; times on the CPU go on using the CPU's."""
        self.table(torch.device(device))
        return self

    def table(self, device: torch.device) -> Tensor:
        """alpha(t)^2 at t = 0, 1/T, ..., 1: [T + 1] float64, on the device."""
        if device not in self._tables:
            self._tables[device] = self.alpha_bar.to(device)
        return self._tables[device]

    def index(self, t: Tensor) -> Tensor:
        """t in [0, 1] -> the nearest table index 0..T (int64)."""
        return (t * self.timesteps).round().long().clamp(0, self.timesteps)

    def _position(self, t: Tensor) -> Tensor:
        """t in steps, float64; a float32 multiple of 1/T counts as exactly that step."""
        position = t.double() * self.timesteps
        nearest = position.round()
        on_grid = (position - nearest).abs() < 1e-3
        return torch.where(on_grid, nearest, position).clamp(0, self.timesteps)

    def _alpha_bar_at(self, t: Tensor) -> Tensor:
        """alpha(t)^2, float64.

        Between steps log alpha is linear in t (Lu et al. 2022, appendix D.4), and below the first
        step it goes on like the second one's, as far as the clean image.
        """
        table, position = self.table(t.device), self._position(t)
        low = position.long()
        start = low.clamp(min=1)
        slope = table[(start + 1).clamp(max=self.timesteps)] / table[start]
        between = (table[start] * slope ** (position - start)).clamp(max=1)
        return torch.where(low == position, table[low], between)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self._alpha_bar_at(t)
        return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_rates(self.beta(t), self._alpha_bar_at(t.double()).log())

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t)

    def beta(self, t: Tensor) -> Tensor:
        """-d log alpha(t)^2 / dt, float64; between steps of the table it is constant."""
        high, table = self._position(t).ceil().long().clamp(min=1), self.table(t.device)
        return self.timesteps * (table[high - 1] / table[high]).log()

    def log_snr(self, t: Tensor) -> Tensor:
        alpha_bar = self._alpha_bar_at(t)
        return (torch.log(alpha_bar) - torch.log1p(-alpha_bar)).to(t.dtype)

    def time_at(self, log_snr: Tensor) -> Tensor:
        y = F.softplus(-log_snr.double())  # -log alpha^2, which rises with t
        nodes = -self.alpha_bar.log()
        nodes[0] = 2 * nodes[1] - nodes[2]
        low = (torch.searchsorted(nodes, y) - 1).clamp(0, self.timesteps - 1)
        return (low + (y - nodes[low]) / (nodes[low + 1] - nodes[low])) / self.timesteps

    def clock(self, t: Tensor) -> Tensor:
        """The index of the training step, from `first_step` on; solvers ask between steps too."""
        return (self._position(t) - 1).clamp(min=0).float() + self.first_step

    def uniform_times(self, n: int, generator: torch.Generator) -> Tensor:
        device = generator.device
        k = torch.randint(1, self.timesteps + 1, (n,), generator=generator, device=device)
        return k.float() / self.timesteps

    def times_of(self, u: Tensor) -> Tensor:
        k = (u * self.timesteps).long().clamp(max=self.timesteps - 1) + 1
        return k.float() / self.timesteps

    def log_variance_bounds(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the posterior variance and of beta for the step that ends at t, float64.

        The first step has no posterior variance; it is given the second one's.
        """
        k, table = self.index(t).clamp(min=1), self.table(t.device)
        now, before, second = table[k], table[k - 1], k.clamp(min=2)
        beta = 1 - table[second] / table[second - 1]
        posterior = beta * (1 - table[second - 1]) / (1 - table[second])
        return posterior.log(), (1 - now / before).log()

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_s | x_t, x0) for the training step from t [B] to s (Ho et al. 2020, eq.
        7).
        """
        k, table = self.index(t).clamp(min=1), self.table(t.device)
        now, before = table[k], table[k - 1]
        beta = 1 - now / before
        from_x0 = before.sqrt() * beta / (1 - now)
        from_x = (now / before).sqrt() * (1 - before) / (1 - now)
        return spread(from_x0, x_t) * x0 + spread(from_x, x_t) * x_t


def spread(values: Tensor, x: Tensor) -> Tensor:
    """One value per image [B], to multiply x [B, ...] with; or one number for all [], which may
    stay on the CPU.
    """
    return values if values.ndim == 0 else values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _preserving_rates(beta: Tensor, log_alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Where alpha^2 + sigma^2 = 1: alpha' = -beta alpha / 2, and sigma' follows."""
    sigma = (-torch.expm1(log_alpha_bar)).sqrt()
    alpha = (log_alpha_bar / 2).exp()
    return -beta * alpha / 2, beta * log_alpha_bar.exp() / (2 * sigma)


@register("schedule", "linear")
def linear(timesteps: int) -> Table:
    """DDPM's and ADM's: betas from 1e-4 to 0.02."""
    if timesteps <= 20:
        raise UsageError(f"process.timesteps {timesteps}: a linear schedule needs more than 20")
    return Table(linear_betas(timesteps))


@register("schedule", "scaled_linear")
def scaled_linear(timesteps: int) -> Table:
    """Stable Diffusion's, linear in the square root of beta; steps count from 1."""
    return Table(scaled_linear_betas(timesteps), first_step=1)


@register("schedule", "cosine")
def cosine(timesteps: int) -> Table:
    """Improved DDPM's and MaskDM's cosine."""
    return Table(cosine_betas(timesteps))


class ShiftOptions(Options):
    shift_size: int = Field(64, ge=1, description="The image side that the schedule is shifted to.")


@register("schedule", "shifted_cosine", ShiftOptions)
def shifted_cosine(timesteps: int, *, shift_size: int) -> Table:
    """The cosine with its log-SNR shifted for larger images (simple diffusion)."""
    return Table(cosine_betas(timesteps, shift_size))


# ------------------------------------------------------------------ continuous time


class Continuous:
    """What schedules in continuous time share: no table, and U-ViT's clock."""

    latest = 1.0
    earliest = 1e-3
    start_std = 1.0

    def __init__(self, timesteps: int) -> None:
        self.timesteps = timesteps

    def to(self, device: torch.device | str) -> Self:
        return self

    def clock(self, t: Tensor) -> Tensor:
        """U-ViT's 999 t."""
        return 999 * t.float()

    def uniform_times(self, n: int, generator: torch.Generator) -> Tensor:
        return self.times_of(torch.rand(n, generator=generator, device=generator.device))

    def times_of(self, u: Tensor) -> Tensor:
        # One draw in 2^24 is 0, where some predictions have nothing to tell apart.
        return torch.where(u == 0, self.earliest, u)


@register("schedule", "vp_sde")
class VpSde(Continuous):
    """The SDE with linear beta(t) from 0.1 to 20 (Song et al. 2021, appendix C)."""

    BETA_MIN, BETA_MAX = 0.1, 20.0

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha(t)^2 of any t, float64."""
        t = t.double()
        return -(self.BETA_MIN * t + (self.BETA_MAX - self.BETA_MIN) * t**2 / 2)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t)

    def beta(self, t: Tensor) -> Tensor:
        """-d log alpha(t)^2 / dt, float64."""
        return self.BETA_MIN + (self.BETA_MAX - self.BETA_MIN) * t.double()

    def time_at(self, log_snr: Tensor) -> Tensor:
        y, rise = F.softplus(-log_snr.double()), self.BETA_MAX - self.BETA_MIN
        return 2 * y / (self.BETA_MIN + (self.BETA_MIN**2 + 2 * rise * y).sqrt())

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _preserving_rates(self.beta(t), self.log_alpha_bar(t))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log = self.log_alpha_bar(t)
        return (log / 2).exp().to(t.dtype), (-torch.expm1(log)).sqrt().to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        log = self.log_alpha_bar(t)
        return (log - torch.log(-torch.expm1(log))).to(t.dtype)


@register("schedule", "vp_cosine")
class VpCosine(VpSde):
    """The cosine in continuous time (Nichol & Dhariwal 2021, eq. 17), which ends in pure noise.

    There x0 cannot be had from eps, so that sampling starts a little earlier (Lu et al. 2022,
    appendix D.4).
    """

    SHIFT = 0.008
    latest = 0.9946

    def _angle(self, t: Tensor | float) -> Tensor:
        time = torch.as_tensor(t, dtype=torch.float64)
        return (time + self.SHIFT) / (1 + self.SHIFT) * math.pi / 2

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return (2 * (self._angle(t).cos() / self._angle(0.0).cos()).log()).clamp(max=0)

    def time_at(self, log_snr: Tensor) -> Tensor:
        cosine = (-F.softplus(-log_snr.double()) / 2).exp() * self._angle(0.0).cos()
        return cosine.acos() * (1 + self.SHIFT) * 2 / math.pi - self.SHIFT

    def beta(self, t: Tensor) -> Tensor:
        return math.pi / (1 + self.SHIFT) * self._angle(t).tan()
