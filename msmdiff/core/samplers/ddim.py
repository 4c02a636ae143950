"""DDIM (Song et al. 2021, eq. 12): from deterministic (eta 0) to as noisy as ancestral sampling (eta 1)."""

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

    times is float64 [S + 1], falling, on the CPU. `noise()` gives the next [B, C, H, W]; with eta 0 it is never called.
    """
    alpha, sigma = (v.cpu() for v in process.alpha_sigma(times))  # read step by step, never from the device
    variance = options.eta**2 * (sigma[1:] / sigma[:-1]) ** 2 * (1 - (alpha[:-1] / alpha[1:]) ** 2)
    direction = (sigma[1:] ** 2 - variance).clamp(min=0).sqrt()
    for i, t in enumerate(times[:-1].tolist()):
        now = torch.full((len(x),), t, device=x.device)
        prediction = denoise(x, now)
        x = alpha[i + 1].item() * prediction.x0 + direction[i].item() * prediction.eps
        if variance[i] > 0:
            x = x + variance[i].sqrt().item() * noise()
    return x
