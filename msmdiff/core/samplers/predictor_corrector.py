"""Predictor-corrector sampling (Song et al. 2021, algorithms 2 and 4): ancestral steps, and
Langevin steps at the time that each of them reaches.
"""

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.diffusion.process import Denoiser, Noise
from msmdiff.core.diffusion.schedules import Schedule, spread
from msmdiff.core.registry import Options, register
from msmdiff.core.samplers.ddpm import posterior


class CorrectorOptions(Options):
    corrections: int = Field(
        1, ge=0, le=1000, description="Langevin steps after each step; 0 makes none."
    )
    snr: float = Field(
        0.16,
        gt=0,
        lt=1,
        description="The signal-to-noise ratio r of a Langevin step: 0.16 suits `ve`, 0.01 a "
        "variance-preserving schedule.",
    )


@register("sampler", "pc", CorrectorOptions)
def sample(
    denoise: Denoiser,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    *,
    corrections: int,
    snr: float,
) -> Tensor:
    """A predictor (an ancestral step) and a corrector (Langevin steps), 1 + corrections evaluations
    a step.

    x [B, C, H, W] at times[0] -> x at times[-1]. A step to t = 0 adds no noise and is not
    corrected. The size of a Langevin step is each image's own; as published it is the batch's.
    """
    from_x0, from_x, log_variance, _ = posterior(schedule, times)
    kept, ratio, scale = from_x0.tolist(), from_x.tolist(), (log_variance / 2).exp().tolist()
    sigma, clean = schedule.alpha_sigma(times)[1].tolist(), (times == 0).tolist()
    widest = max(1.0, schedule.start_std)
    for i, t in enumerate(times[:-1]):
        x = kept[i] * denoise(x, t).x0 + ratio[i] * x
        if clean[i + 1]:
            break
        x = x + scale[i] * noise()
        for _ in range(corrections):
            score = -denoise(x, times[i + 1]).eps / sigma[i + 1]
            x = _langevin(x, score, noise(), snr, widest)
    return x


def _langevin(x: Tensor, score: Tensor, z: Tensor, snr: float, widest: float) -> Tensor:
    """x + e score + sqrt(2 e) z with e = 2 (snr |z| / |score|)^2; all [B, C, H, W].

    Of Gaussian data in many dimensions it keeps the variance but for a factor 1 / (1 - snr^2).
    """
    size = z.flatten(1).norm(dim=1)
    # No density of deviation d has a smaller score than 1 / d; an untrained network's may be 0.
    least = torch.maximum(score.flatten(1).norm(dim=1), size / widest)
    step = 2 * (snr * size / least) ** 2
    return x + spread(step, x) * score + spread((2 * step).sqrt(), x) * z
