"""DDIM (Song et al. 2021, eq. 12): from deterministic (eta 0) to as noisy as ancestral sampling
(eta 1).
"""

from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.process import Denoiser, Noise
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.registry import Options, register
from msmdiff.core.samplers.times import Plan, planned


class DdimOptions(Options):
    eta: float = Field(
        0.0,
        ge=0,
        le=10,
        description="How much noise each step adds: 0 is deterministic, 1 as noisy as ddpm.",
    )


@register("sampler", "ddim", DdimOptions)
@planned(Plan(default="even"))
def sample(
    denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise, *, eta: float
) -> Tensor:
    """Denoising diffusion implicit models; noisy with eta above 0.

    x [B, C, H, W] at times[0] -> x at times[-1]. With eta 0 `noise` is never called, and times may
    also rise.
    """
    alpha, sigma = schedule.alpha_sigma(times)
    kept = 1 - (alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])) ** 2
    variance = eta**2 * sigma[1:] ** 2 * kept
    direction = (sigma[1:] ** 2 - variance).clamp(min=0).sqrt().tolist()
    scale, alphas = variance.clamp(min=0).sqrt().tolist(), alpha.tolist()
    for i, t in enumerate(times[:-1]):
        estimate = denoise(x, t)
        x = alphas[i + 1] * estimate.x0 + direction[i] * estimate.eps
        if scale[i] > 0:
            x = x + scale[i] * noise()
    return x
