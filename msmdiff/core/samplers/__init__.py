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
from msmdiff.core.samplers import ddim, ddpm, differential, dpm_solver, times

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
    """Raises UsageError for one of the `given` keys of a `sample` section that changes nothing
    beside the others.
    """
    grid, guided = times.grid_of(options), options.cfg_scale != 1
    adaptive = options.sampler in _SOLVERS and options.method == "adaptive"
    multistep = options.sampler == "unipc" or options.method == "multistep"
    idle: dict[str, str] = {}
    if grid in times.INDEX_GRIDS:
        idle |= dict.fromkeys(
            ("end", "denoise_to_zero"), f"on the grid {grid}, only on {', '.join(times.FREE_GRIDS)}"
        )
    if adaptive:
        idle |= dict.fromkeys(("steps", "grid", "taylor"), "with sample.method adaptive")
    if not multistep:
        idle["lower_order_final"] = f"with sample.method {options.method}, only with multistep"
    if not guided:
        keys = ("cfg_channels", "cfg_schedule", "cfg_power", "cfg_interval", "guide", "guide_ema")
        idle |= dict.fromkeys(keys, "where nothing is guided (sample.cfg_scale 1)")
    elif options.cfg_schedule != "power_cosine":
        idle["cfg_power"] = (
            f"with sample.cfg_schedule {options.cfg_schedule}, only with power_cosine"
        )
    if options.guide is None:
        idle.setdefault("guide_ema", "without a sample.guide")
    if not options.clip and options.threshold is None:
        idle["eps_after_clip"] = "where x0 is not clipped (sample.clip false)"
    for key, names in TAKEN_BY.items():
        if options.sampler not in names:
            idle[key] = f"on the sampler {options.sampler}, only on {', '.join(names)}"
    for key in given:
        if key in idle and (value := getattr(options, key)) is not None:
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UsageError(f"sample.{key} {shown} has no effect {idle[key]}")
