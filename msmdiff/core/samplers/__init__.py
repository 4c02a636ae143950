"""The registry of samplers: functions from noise to a sample, given a denoiser.

A new sampler is one function and one line in SAMPLERS. All share a signature:
`sampler(denoise, process, x, times, noise, options) -> x0`.
"""

from collections.abc import Callable

from msmdiff.core.samplers import ddim, ddpm

SAMPLERS: dict[str, Callable] = {"ddim": ddim.sample, "ddpm": ddpm.sample}
