"""The forward process x_t = alpha(t) x0 + sigma(t) eps: schedules, predictions, loss weights, and
the network's clock.

Time is a float in [0, 1]: 0 is the clean image. A discrete schedule of T steps lives on the grid t
= k / T, where k = 1..T is the training index plus one, so that the published integer index is
`round(t T) - 1`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from msmdiff.core.config import ProcessConfig
from msmdiff.core.errors import UsageError


@dataclass
class Prediction:
    """What a denoiser says of x_t: x0 and eps [B, C, H, W], and the variance of the step where the
    network learns it.

    log_variance is that of one step of the training schedule; a sampler on fewer steps recomputes
    it from `variance`, which lies between the posterior's (0) and beta's (1).
    """

    x0: Tensor
    eps: Tensor
    log_variance: Tensor | None = None
    variance: Tensor | None = None


Denoiser = Callable[[Tensor, Tensor], Prediction]
"""(x_t [B, C, H, W], t) -> what it makes of it; t is a float64 number on the CPU, or [B] on x_t's
device.
"""

Noise = Callable[[], Tensor]
"""The next Gaussian noise [B, C, H, W]."""


def linear_betas(timesteps: int) -> np.ndarray:
    """DDPM's schedule, 1e-4..0.02 scaled by 1000/T (Ho et al. 2020, section 4; Dhariwal & Nichol
    2021).
    """
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64)


def scaled_linear_betas(timesteps: int) -> np.ndarray:
    """Stable Diffusion's schedule, linear in the square root of beta (Rombach et al. 2022), which
    U-ViT uses.
    """
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


class Process:
    """A discrete variance-preserving process.

    Args:
        betas: [T] float64, the noise added at each step.
        prediction: what the network's output means.
        weighting: loss weight, `uniform` or `min_snr` (Hang et al. 2023).
        first_step: what the network is fed at the first step, 0 or 1.
    """

    def __init__(
        self,
        betas: np.ndarray,
        prediction: Literal["eps", "x0", "v"] = "eps",
        weighting: Literal["uniform", "min_snr"] = "uniform",
        min_snr_gamma: float = 5.0,
        time_sampling: Literal["uniform", "stratified", "loss_second_moment"] = "uniform",
        first_step: int = 0,
    ) -> None:
        self.timesteps = len(betas)
        self.first_step = first_step
        self.prediction = prediction
        self.weighting = weighting
        self.min_snr_gamma = min_snr_gamma
        self.time_sampling = time_sampling
        # Index k of the table is t = k / T; index 0 is the clean image, which no network is trained
        # on.
        self.alpha_bar = torch.from_numpy(np.concatenate([[1.0], np.cumprod(1 - betas)]))
        self._tables = {self.alpha_bar.device: self.alpha_bar}

    latest = 1.0
    """Where sampling starts."""

    @property
    def earliest(self) -> float:
        """Where solvers stop by default: the first training step."""
        return 1 / self.timesteps

    def to(self, device: torch.device | str) -> "Process":
        """Put a copy of the float64 table on a device; returns self. Times on the CPU go on using
        the CPU's.
        """
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
        return torch.where((position - nearest).abs() < 1e-3, nearest, position).clamp(
            0, self.timesteps
        )

    def _alpha_bar_at(self, t: Tensor) -> Tensor:
        """alpha(t)^2, float64; between steps log alpha is linear in t (Lu et al. 2022, appendix
        D.4), and below the first step it goes on like the second one's, as far as the clean
        image."""
        table, position = self.table(t.device), self._position(t)
        low = position.long()
        start = low.clamp(min=1)
        slope = table[(start + 1).clamp(max=self.timesteps)] / table[start]
        return torch.where(
            low == position, table[low], (table[start] * slope ** (position - start)).clamp(max=1)
        )

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, in t's shape and dtype (float64 in, float64 out)."""
        alpha_bar = self._alpha_bar_at(t)
        return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t; +inf at t = 0."""
        alpha_bar = self._alpha_bar_at(t)
        return (torch.log(alpha_bar) - torch.log1p(-alpha_bar)).to(t.dtype)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The inverse of `log_snr`, float64; log_snr on the CPU."""
        y = F.softplus(-log_snr.double())  # -log alpha^2, which rises with t
        nodes = -self.alpha_bar.log()
        nodes[0] = 2 * nodes[1] - nodes[2]
        low = (torch.searchsorted(nodes, y) - 1).clamp(0, self.timesteps - 1)
        return (low + (y - nodes[low]) / (nodes[low + 1] - nodes[low])) / self.timesteps

    def beta(self, t: Tensor) -> Tensor:
        """-d log alpha(t)^2 / dt, float64, of the SDE dx = -beta x / 2 dt + sqrt(beta) dw; between
        steps of the table it is constant."""
        high, table = self._position(t).ceil().long().clamp(min=1), self.table(t.device)
        return self.timesteps * (table[high - 1] / table[high]).log()

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t for x0, eps [B, ...] and t [B]."""
        alpha, sigma = self._like(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output, in x0's shape. v = alpha eps - sigma x0 (Salimans & Ho
        2022).
        """
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha, sigma = self._like(t, x0)
        return alpha * eps - sigma * x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The network's output at x_t [B, C, ...], t [B] -> x0 and eps in x_t's shape.

        An output of 2C channels carries the learned variance in the second half (Nichol & Dhariwal
        2021, eq. 15).
        """
        alpha, sigma = self._like(t, x_t)
        learned: dict[str, Tensor] = {}
        if output.shape[1] == 2 * x_t.shape[1]:
            output, value = output.chunk(2, dim=1)
            variance = (value + 1) / 2
            low, high = (_view(bound, x_t) for bound in self.log_variance_bounds(t))
            learned = {"variance": variance, "log_variance": variance * high + (1 - variance) * low}
        if self.prediction == "eps":
            return Prediction((x_t - sigma * output) / alpha, output, **learned)
        if self.prediction == "x0":
            return Prediction(output, (x_t - alpha * output) / sigma, **learned)
        return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output, **learned)

    def log_variance_bounds(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the posterior variance and of beta for the training step that ends at t
        [B], float64.

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
        from_x0, from_x = (
            before.sqrt() * beta / (1 - now),
            (now / before).sqrt() * (1 - before) / (1 - now),
        )
        return _view(from_x0, x_t) * x0 + _view(from_x, x_t) * x_t

    def eps_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x_t out of x0."""
        alpha, sigma = self._like(t, x_t)
        return (x_t - alpha * x0) / sigma

    def weight(self, t: Tensor) -> Tensor:
        """The loss weight of each t [B]. min-SNR: min(SNR, gamma) in x0 space, divided by what eps
        or v count for.
        """
        if self.weighting == "uniform":
            return torch.ones_like(t)
        snr = self.log_snr(t).exp()
        divisor = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        return snr.clamp(max=self.min_snr_gamma) / divisor

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n training times [n] float32 in {1/T, ..., 1}, on the generator's device.

        `stratified` draws one from each of n equal parts of the range, in shuffled order. (Drawing
        by past losses, `loss_second_moment`, is the objective's, which knows them.)
        """
        device = generator.device
        if self.time_sampling != "stratified":
            k = torch.randint(1, self.timesteps + 1, (n,), generator=generator, device=device)
        else:
            u = (
                torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)
            ) / n
            u = u[torch.randperm(n, generator=generator, device=device)]
            k = (u * self.timesteps).long().clamp(max=self.timesteps - 1) + 1
        return k.float() / self.timesteps

    def model_time(self, t: Tensor) -> Tensor:
        """The time the network is fed: the index of the training process, as float32, from
        `first_step` on.

        Solvers may ask for times between two steps.
        """
        return (self._position(t) - 1).clamp(min=0).float() + self.first_step

    def _like(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return _view(alpha, x), _view(sigma, x)


def _view(values: Tensor, x: Tensor) -> Tensor:
    """One value per image, [B], to multiply x [B, ...] with; or one number for all, [], which may
    stay on the CPU.
    """
    return values if values.ndim == 0 else values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class ContinuousProcess(Process):
    """The variance-preserving SDE with linear beta(t) from 0.1 to 20 (Song et al. 2021, appendix
    C).

    Its `timesteps` only say how finely samplers may step; training times are drawn from the whole
    of [0, 1].
    """

    BETA_MIN, BETA_MAX = 0.1, 20.0
    earliest = 1e-3

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha(t)^2 of any t, float64."""
        t = t.double()
        return -(self.BETA_MIN * t + (self.BETA_MAX - self.BETA_MIN) * t**2 / 2)

    def time_at(self, log_snr: Tensor) -> Tensor:
        y, rise = F.softplus(-log_snr.double()), self.BETA_MAX - self.BETA_MIN
        return 2 * y / (self.BETA_MIN + (self.BETA_MIN**2 + 2 * rise * y).sqrt())

    def beta(self, t: Tensor) -> Tensor:
        return self.BETA_MIN + (self.BETA_MAX - self.BETA_MIN) * t.double()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log = self.log_alpha_bar(t)
        return (log / 2).exp().to(t.dtype), (-torch.expm1(log)).sqrt().to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        log = self.log_alpha_bar(t)
        return (log - torch.log(-torch.expm1(log))).to(t.dtype)

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, generator=generator, device=generator.device)
        if self.time_sampling == "stratified":
            order = torch.randperm(n, generator=generator, device=generator.device)
            u = (order + u) / n
        return u

    def model_time(self, t: Tensor) -> Tensor:
        """U-ViT's 999 t."""
        return 999 * t.float()


class CosineProcess(ContinuousProcess):
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17) in continuous time, which ends in pure
    noise.

    There x0 cannot be had from eps, so that sampling starts a little earlier (Lu et al. 2022,
    appendix D.4).
    """

    SHIFT = 0.008
    latest = 0.9946

    def _angle(self, t: Tensor | float) -> Tensor:
        return (
            (torch.as_tensor(t, dtype=torch.float64) + self.SHIFT) / (1 + self.SHIFT) * math.pi / 2
        )

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return (2 * (self._angle(t).cos() / self._angle(0.0).cos()).log()).clamp(max=0)

    def time_at(self, log_snr: Tensor) -> Tensor:
        cosine = (-F.softplus(-log_snr.double()) / 2).exp() * self._angle(0.0).cos()
        return cosine.acos() * (1 + self.SHIFT) * 2 / math.pi - self.SHIFT

    def beta(self, t: Tensor) -> Tensor:
        return math.pi / (1 + self.SHIFT) * self._angle(t).tan()


def build(config: ProcessConfig) -> Process:
    """The process a configuration asks for."""
    options = (config.prediction, config.weighting, config.min_snr_gamma, config.time_sampling)
    if config.schedule == "linear":
        if config.timesteps <= 20:
            raise UsageError(
                f"process.timesteps {config.timesteps}: a linear schedule needs more than 20"
            )
        return Process(linear_betas(config.timesteps), *options)
    if config.schedule == "scaled_linear":
        return Process(scaled_linear_betas(config.timesteps), *options, first_step=1)
    if config.schedule in ("vp_sde", "vp_cosine"):
        made = ContinuousProcess if config.schedule == "vp_sde" else CosineProcess
        return made(np.zeros(config.timesteps), *options)
    shift = config.shift_size if config.schedule == "shifted_cosine" else None
    return Process(cosine_betas(config.timesteps, shift), *options)
