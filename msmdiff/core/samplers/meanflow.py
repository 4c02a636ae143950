"""MeanFlow's sampler (Geng et al. 2025): a network of average velocities crosses any distance at
once.
"""

from typing import Any

from torch import Tensor

from msmdiff.core.diffusion.process import Denoiser, Noise
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Entry, register
from msmdiff.core.samplers.times import Plan, planned
from msmdiff.core.sections import SampleConfig


def whole_way(
    schedule: Schedule, entry: Entry, section: SampleConfig, ends: tuple[float, float]
) -> Tensor:
    """The times from pure noise at 1 to the image at 0, [steps + 1].

    Raises UsageError for an end before the image, and for times that cannot reach both.
    """
    assert isinstance(section.steps, int)
    options: Any = section
    if options.end is not None:
        raise UsageError(
            f"sample.end {options.end:g} has no effect on the sampler meanflow, whose last step "
            "reaches the image"
        )
    times = entry.make(schedule, section.steps, 1.0, 0.0)
    if not times.isfinite().all():
        raise UsageError(
            f"sample.times {entry.name} do not reach from pure noise to the image: the sampler "
            "meanflow takes uniform, quadratic or shifted ones"
        )
    return times


@register("sampler", "meanflow")
@planned(Plan(default="uniform", stops=True, lay=whole_way))
def sample(denoise: Denoiser, schedule: Schedule, x: Tensor, times: Tensor, noise: Noise) -> Tensor:
    """Steps x_r = x_t - (t - r) u(x_t, r, t) by the average velocity u, for networks trained with
    objective.name meanflow: 1, 2 or 4 of them give images.
    """
    # `denoise` makes x0 = x_t - t u and eps = x_t + (1 - t) u of u: x_r lies between them.
    alpha, sigma = (values.tolist() for values in schedule.alpha_sigma(times))
    for i, t in enumerate(times[:-1]):
        estimate = denoise(x, t, times[i + 1])
        x = alpha[i + 1] * estimate.x0 + sigma[i + 1] * estimate.eps
    return x
