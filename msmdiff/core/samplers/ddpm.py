"""Ancestral sampling (Ho et al. 2020, eq. 6-7) on any falling sequence of times."""

import torch
from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.process import Denoiser, Noise, Process


def posterior(process: Process, times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q(x_s | x_t, x0) for each step of times [S + 1]: the mean's factors of x0 and of x_t, and
    the logarithms of its variance and of beta = 1 - (alpha_t / alpha_s)^2; all [S] float64.

    A last step to the clean image has no variance; for its logarithm it is given the step's before,
    as ADM does.
    """
    alpha, sigma = process.alpha_sigma(times)
    ratio = alpha[:-1] / alpha[1:]
    beta = 1 - ratio**2
    remaining = (sigma[1:] / sigma[:-1]) ** 2
    variance = beta * remaining
    if times[-1] == 0:
        variance[-1] = variance[-2] if len(variance) > 1 else beta[-1]
    return alpha[1:] * beta / sigma[:-1] ** 2, ratio * remaining, variance.log(), beta.log()


def sample(
    denoise: Denoiser,
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    options: SampleConfig,
) -> Tensor:
    """x [B, C, H, W] at times[0] -> x at times[-1].

    The variance of a step is the posterior's (`options.variance` small) or beta (large), or, where
    the network learns it, between the two (Nichol & Dhariwal 2021, eq. 15). A step to t = 0 adds no
    noise.
    """
    from_x0, from_x, low, high = (table.tolist() for table in posterior(process, times))
    fixed = high if options.variance == "large" else low
    noisy = (times[1:] > 0).tolist()
    for i, t in enumerate(times[:-1]):
        prediction = denoise(x, t)
        x = from_x0[i] * prediction.x0 + from_x[i] * x
        if noisy[i]:
            log_variance = torch.tensor(fixed[i], dtype=x.dtype)
            if prediction.variance is not None:
                log_variance = low[i] + (high[i] - low[i]) * prediction.variance
            x = x + (log_variance / 2).exp() * noise()
    return x
