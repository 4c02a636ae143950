"""Plain steps in time: Euler and Heun on the probability-flow ODE, Euler-Maruyama on the reverse
SDE.

dx/dt = -beta x / 2 + w beta eps / sigma, with w = 1/2 for the ODE and w = 1 for the SDE, whose
noise is sqrt(beta) dw (Song et al. 2021, eq. 6 and 13, for a variance-preserving process).
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
    """x [B, C, H, W] at times[0] -> x at times[-1]; a step to t = 0 is Euler's and adds no noise."""
    stochastic, heun = options.sampler == "euler_maruyama", options.sampler == "heun"
    beta, sigma = process.beta(times), process.alpha_sigma(times)[1]
    of_x, of_eps = (-beta / 2).tolist(), (beta / sigma * (1 if stochastic else 0.5)).tolist()
    step = times.diff()
    scale, steps, last = (
        (beta[:-1] * -step).sqrt().tolist(),
        step.tolist(),
        (times[1:] == 0).tolist(),
    )
    for i, t in enumerate(times[:-1]):
        slope = of_x[i] * x + of_eps[i] * denoise(x, t).eps
        ahead = x + steps[i] * slope
        if heun and not last[i]:
            end = of_x[i + 1] * ahead + of_eps[i + 1] * denoise(ahead, times[i + 1]).eps
            ahead = x + steps[i] / 2 * (slope + end)
        x = ahead
        if stochastic and not last[i]:
            x = x + scale[i] * noise()
    return x
