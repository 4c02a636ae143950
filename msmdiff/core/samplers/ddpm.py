"""Ancestral sampling (Ho et al. 2020, eq. 6-7) on any falling sequence of times."""

from collections.abc import Callable

import torch
from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.process import Prediction, Process


def sample(
    denoise: Callable[[Tensor, Tensor], Prediction],
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Callable[[], Tensor],
    options: SampleConfig,
) -> Tensor:
    """x [B, C, H, W] at times[0] -> x0 at times[-1].

    Each step draws from q(x_s | x_t, x0); its variance is the posterior's (`options.variance` small) or
    1 - (alpha_t / alpha_s)^2 (large), or, where the network learns it, between the two (Nichol & Dhariwal 2021,
    eq. 15). The last step, to t = 0, adds no noise.
    """
    alpha, sigma = (v.cpu() for v in process.alpha_sigma(times))  # read step by step, never from the device
    ratio = alpha[:-1] / alpha[1:]
    beta = 1 - ratio**2
    from_x0 = alpha[1:] * beta / sigma[:-1] ** 2
    from_x = ratio * sigma[1:] ** 2 / sigma[:-1] ** 2
    posterior = beta * sigma[1:] ** 2 / sigma[:-1] ** 2
    variance = beta if options.variance == "large" else posterior
    last = len(times) - 2
    for i, t in enumerate(times[:-1].tolist()):
        prediction = denoise(x, torch.full((len(x),), t, device=x.device))
        x = from_x0[i].item() * prediction.x0 + from_x[i].item() * x
        if i < last:
            scale: float | Tensor = variance[i].sqrt().item()
            if prediction.variance is not None:
                low, high = posterior[i].log().item() / 2, beta[i].log().item() / 2
                scale = torch.exp(low + (high - low) * prediction.variance)
            x = x + scale * noise()
    return x
