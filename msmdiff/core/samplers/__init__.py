"""The registry of samplers: functions from noise to a sample, given a denoiser.

A new sampler is one function and one line in SAMPLERS. All share a signature:
`sampler(denoise, process, x, times, noise, options) -> x0`, with

    times:   float64 [S + 1], falling, on the CPU; from `times.visited`
    options: the `sample` section

What depends on times only is computed before the first step, and the device is never waited for.
"""

from collections.abc import Callable, Iterable

from msmdiff.core.config import SampleConfig
from msmdiff.core.errors import UsageError
from msmdiff.core.samplers import ddim, ddpm, differential, dpm_solver

SAMPLERS: dict[str, Callable] = {
    "ddim": ddim.sample,
    "ddpm": ddpm.sample,
    "dpm_solver": dpm_solver.sample,
    "dpm_solver++": dpm_solver.sample,
    "unipc": dpm_solver.sample,
    "euler": differential.sample,
    "heun": differential.sample,
    "euler_maruyama": differential.sample,
}

_SOLVERS = ("dpm_solver", "dpm_solver++")
_MULTISTEP = (*_SOLVERS, "unipc")
TAKEN_BY: dict[str, tuple[str, ...]] = {
    "eta": ("ddim",),
    "variance": ("ddpm",),
    "order": _MULTISTEP,
    "method": _SOLVERS,
    "taylor": _SOLVERS,
    "lower_order_final": _MULTISTEP,
    "denoise_to_zero": _MULTISTEP,
}
"""The keys of the `sample` section that have an effect on some samplers only."""


def check(options: SampleConfig, given: Iterable[str]) -> None:
    """Raises UsageError for one of the `given` keys that has no effect on the sampler."""
    for key in given:
        takers = TAKEN_BY.get(key, (options.sampler,))
        if options.sampler not in takers:
            value = getattr(options, key)
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UsageError(
                f"sample.{key} {shown} has no effect on the sampler {options.sampler}, only on {', '.join(takers)}"
            )
