"""DDIM (Song et al. 2021, eq. 12): from deterministic (eta 0) to as noisy as ancestral sampling
(eta 1).
"""

from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.process import Denoiser, Noise, Process


def sample(
    denoise: Denoiser,
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    options: SampleConfig,
) -> Tensor:
    """x [B, C, H, W] at times[0] -> x at times[-1]. With eta 0 `noise` is never called, and times
    may also rise.
    """
    alpha, sigma = process.alpha_sigma(times)
    variance = options.eta**2 * (sigma[1:] / sigma[:-1]) ** 2 * (1 - (alpha[:-1] / alpha[1:]) ** 2)
    direction = (sigma[1:] ** 2 - variance).clamp(min=0).sqrt().tolist()
    scale, alphas = variance.clamp(min=0).sqrt().tolist(), alpha.tolist()
    for i, t in enumerate(times[:-1]):
        prediction = denoise(x, t)
        x = alphas[i + 1] * prediction.x0 + direction[i] * prediction.eps
        if scale[i] > 0:
            x = x + scale[i] * noise()
    return x
