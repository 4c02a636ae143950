"""The forward process x_t = alpha(t) x0 + sigma(t) eps: schedules, predictions, loss weights, and the network's clock.

Time is a float in [0, 1]: 0 is the clean image. A discrete schedule of T steps lives on the grid t = k / T, where
k = 1..T is the training index plus one, so that the published integer index is `round(t T) - 1`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from msmdiff.core.config import ProcessConfig
from msmdiff.core.errors import UsageError


@dataclass
class Prediction:
    """What a denoiser says of x_t: x0 and eps [B, C, H, W], and the variance of the step where the network learns it.

    log_variance is that of one step of the training schedule; a sampler on fewer steps recomputes it from `variance`,
    which lies between the posterior's (0) and beta's (1).
    """

    x0: Tensor
    eps: Tensor
    log_variance: Tensor | None = None
    variance: Tensor | None = None


def linear_betas(timesteps: int) -> np.ndarray:
    """DDPM's schedule, 1e-4..0.02 scaled by 1000/T (Ho et al. 2020, section 4; Dhariwal & Nichol 2021)."""
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64)


def scaled_linear_betas(timesteps: int) -> np.ndarray:
    """Stable Diffusion's schedule, linear in the square root of beta (Rombach et al. 2022), which U-ViT uses."""
    return np.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=np.float64) ** 2


def cosine_betas(timesteps: int, shift_size: int | None = None) -> np.ndarray:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17) with betas clipped at 0.999.

    `shift_size` d moves the log-SNR by 2 log(64 / d), which keeps the noise per visible detail of a 64-pixel image
    (Hoogeboom et al. 2023, "simple diffusion", section 3.1).
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
        time_sampling: Literal["uniform", "stratified"] = "uniform",
        first_step: int = 0,
    ) -> None:
        self.timesteps = len(betas)
        self.first_step = first_step
        self.prediction = prediction
        self.weighting = weighting
        self.min_snr_gamma = min_snr_gamma
        self.time_sampling = time_sampling
        # Index k of the table is t = k / T; index 0 is the clean image, which no network is trained on.
        self.alpha_bar = torch.from_numpy(np.concatenate([[1.0], np.cumprod(1 - betas)]))

    def to(self, device: torch.device | str) -> "Process":
        """Move the float64 table; returns self."""
        self.alpha_bar = self.alpha_bar.to(device)
        return self

    def index(self, t: Tensor) -> Tensor:
        """t in [0, 1] -> the nearest table index 0..T (int64)."""
        return (t * self.timesteps).round().long().clamp(0, self.timesteps)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t, in t's shape and dtype (float64 in, float64 out)."""
        alpha_bar = self.alpha_bar[self.index(t).to(self.alpha_bar.device)]
        return alpha_bar.sqrt().to(t.dtype), (1 - alpha_bar).sqrt().to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at t; +inf at t = 0."""
        alpha_bar = self.alpha_bar[self.index(t).to(self.alpha_bar.device)]
        return (torch.log(alpha_bar) - torch.log1p(-alpha_bar)).to(t.dtype)

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t for x0, eps [B, ...] and t [B]."""
        alpha, sigma = self._like(t, x0)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output, in x0's shape. v = alpha eps - sigma x0 (Salimans & Ho 2022)."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha, sigma = self._like(t, x0)
        return alpha * eps - sigma * x0

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> Prediction:
        """The network's output at x_t [B, C, ...], t [B] -> x0 and eps in x_t's shape.

        An output of 2C channels carries the learned variance in the second half (Nichol & Dhariwal 2021, eq. 15).
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
        """Logarithms of the posterior variance and of beta for the training step that ends at t [B], float64.

        The first step has no posterior variance; it is given the second one's.
        """
        k = self.index(t).to(self.alpha_bar.device).clamp(min=1)
        now, before, second = self.alpha_bar[k], self.alpha_bar[k - 1], k.clamp(min=2)
        beta = 1 - self.alpha_bar[second] / self.alpha_bar[second - 1]
        posterior = beta * (1 - self.alpha_bar[second - 1]) / (1 - self.alpha_bar[second])
        return posterior.log(), (1 - now / before).log()

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_s | x_t, x0) for the training step from t [B] to s (Ho et al. 2020, eq. 7)."""
        k = self.index(t).to(self.alpha_bar.device).clamp(min=1)
        now, before = self.alpha_bar[k], self.alpha_bar[k - 1]
        beta = 1 - now / before
        from_x0, from_x = before.sqrt() * beta / (1 - now), (now / before).sqrt() * (1 - before) / (1 - now)
        return _view(from_x0, x_t) * x0 + _view(from_x, x_t) * x_t

    def eps_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x_t out of x0."""
        alpha, sigma = self._like(t, x_t)
        return (x_t - alpha * x0) / sigma

    def weight(self, t: Tensor) -> Tensor:
        """The loss weight of each t [B]. min-SNR: min(SNR, gamma) in x0 space, divided by what eps or v count for."""
        if self.weighting == "uniform":
            return torch.ones_like(t)
        snr = self.log_snr(t).exp()
        divisor = {"eps": snr, "x0": torch.ones_like(snr), "v": snr + 1}[self.prediction]
        return snr.clamp(max=self.min_snr_gamma) / divisor

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """n training times [n] float32 in {1/T, ..., 1}, on the generator's device.

        `stratified` draws one from each of n equal parts of the range, in shuffled order.
        """
        device = generator.device
        if self.time_sampling == "uniform":
            k = torch.randint(1, self.timesteps + 1, (n,), generator=generator, device=device)
        else:
            u = (torch.arange(n, device=device) + torch.rand(n, generator=generator, device=device)) / n
            u = u[torch.randperm(n, generator=generator, device=device)]
            k = (u * self.timesteps).long().clamp(max=self.timesteps - 1) + 1
        return k.float() / self.timesteps

    def model_time(self, t: Tensor) -> Tensor:
        """The time the network is fed: the integer index of the training process, as float32, from `first_step` on."""
        return (self.index(t) - 1).clamp(min=0).float() + self.first_step

    def _like(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return _view(alpha, x), _view(sigma, x)


def _view(values: Tensor, x: Tensor) -> Tensor:
    """One value per image, [B], to be multiplied with x [B, ...]."""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class ContinuousProcess(Process):
    """The variance-preserving SDE with linear beta(t) from 0.1 to 20 (Song et al. 2021, appendix C).

    Its `timesteps` only say how finely samplers may step; training times are drawn from the whole of [0, 1].
    """

    BETA_MIN, BETA_MAX = 0.1, 20.0

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha(t)^2 of any t, float64."""
        t = t.double()
        return -(self.BETA_MIN * t + (self.BETA_MAX - self.BETA_MIN) * t**2 / 2)

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


def build(config: ProcessConfig) -> Process:
    """The process a configuration asks for."""
    options = (config.prediction, config.weighting, config.min_snr_gamma, config.time_sampling)
    if config.schedule == "linear":
        if config.timesteps <= 20:
            raise UsageError(f"process.timesteps {config.timesteps}: a linear schedule needs more than 20")
        return Process(linear_betas(config.timesteps), *options)
    if config.schedule == "scaled_linear":
        return Process(scaled_linear_betas(config.timesteps), *options, first_step=1)
    if config.schedule == "vp_sde":
        return ContinuousProcess(np.zeros(config.timesteps), *options)
    shift = config.shift_size if config.schedule == "shifted_cosine" else None
    return Process(cosine_betas(config.timesteps, shift), *options)
