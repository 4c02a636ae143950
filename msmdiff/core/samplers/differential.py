"""Plain steps in time: Euler and Heun on the probability-flow ODE, Euler-Maruyama on the reverse
SDE.

dx/dt = alpha' x0 + sigma' eps, and for the SDE g^2 eps / (2 sigma) more, with noise g dw (Song et
al. 2021, eq. 6 and 13). x0 is what eps leaves of x: x0 = (x - sigma eps) / alpha.
"""

from torch import Tensor

from msmdiff.core.diffusion.process import Denoiser, Estimate, Noise
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.registry import register


class _Slopes:
    """dx/dt at each of some times."""

    def __init__(self, schedule: Schedule, times: Tensor, stochastic: bool = False) -> None:
        sigma = schedule.alpha_sigma(times)[1]
        of_x0, of_eps = schedule.rates(times)
        if stochastic:
            of_eps = of_eps + schedule.diffusion(times) / (2 * sigma)
        self._of_x0, self._of_eps = of_x0.tolist(), of_eps.tolist()

    def at(self, i: int, estimate: Estimate) -> Tensor:
        """The slope at times[i], [B, C, H, W]."""
        return self._of_x0[i] * estimate.x0 + self._of_eps[i] * estimate.eps


@register("sampler", "euler")
def euler(denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Tensor:
    """First-order steps in time on the probability flow."""
    slopes, steps = _Slopes(schedule, times), times.diff().tolist()
    for i, t in enumerate(times[:-1]):
        x = x + steps[i] * slopes.at(i, denoise(x, t))
    return x


@register("sampler", "heun")
def heun(denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Tensor:
    """Second-order steps in time, two evaluations each; a step to t = 0 is Euler's."""
    slopes, steps, last = _Slopes(schedule, times), times.diff().tolist(), (times == 0).tolist()
    for i, t in enumerate(times[:-1]):
        slope = slopes.at(i, denoise(x, t))
        ahead = x + steps[i] * slope
        if not last[i + 1]:
            end = slopes.at(i + 1, denoise(ahead, times[i + 1]))
            ahead = x + steps[i] / 2 * (slope + end)
        x = ahead
    return x


@register("sampler", "euler_maruyama")
def euler_maruyama(
    denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise
) -> Tensor:
    """First-order steps on the reverse SDE; a step to t = 0 adds no noise."""
    slopes, steps = _Slopes(schedule, times, stochastic=True), times.diff()
    scale = (schedule.diffusion(times)[:-1] * -steps).sqrt().tolist()
    last, lengths = (times[1:] == 0).tolist(), steps.tolist()
    for i, t in enumerate(times[:-1]):
        x = x + lengths[i] * slopes.at(i, denoise(x, t))
        if not last[i]:
            x = x + scale[i] * noise()
    return x
