"""The registry of samplers: functions from noise to a sample, given a denoiser.

A new sampler is one function and one line in SAMPLERS. All share a signature:
`sampler(denoise, process, x, times, noise, options) -> x0`, with

    times:   float64 [S + 1], falling, on the CPU; from `times.visited`
    options: the `sample` section

What depends on times only is computed before the first step, and the device is never waited for.
"""

from collections.abc import Callable

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
