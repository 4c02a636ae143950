"""Which times a sampler visits, from pure noise (t = 1) down to the clean image (t = 0), as falling
float64 tensors.
"""

import torch
from torch import Tensor

from msmdiff.core.config import SampleConfig
from msmdiff.core.diffusion.process import Process
from msmdiff.core.errors import UsageError

# ------------------------------------------------------------------ training steps, with the clean


def even(timesteps: int, steps: int | str) -> Tensor:
    """steps + 1 grid times, evenly spaced over the whole range: [steps + 1], from 1 to 0."""
    k = torch.linspace(timesteps, 0, _count(timesteps, steps) + 1, dtype=torch.float64).round()
    return k / timesteps


def maskdm(timesteps: int, steps: int | str) -> Tensor:
    """MaskDM's DDIM grid: the integer part of a float32 linspace(-1, T - 1, steps + 1); index -1 is
    clean.
    """
    indices = (
        torch.linspace(-1, timesteps - 1, _count(timesteps, steps) + 1, dtype=torch.float32)
        .int()
        .flip(0)
    )
    return (indices.double() + 1) / timesteps


def adm(timesteps: int, steps: int | str) -> Tensor:
    """ADM's respacing (Nichol & Dhariwal 2021), then clean.

    `250`: so many evenly rounded indices from 0 to T - 1. `10,20,30`: so many in each third.
    `ddim25`: the integer stride from 0 that gives 25. Raises UsageError where there is none, or a
    part has fewer indices.
    """
    if str(steps).startswith("ddim"):
        wanted = int(str(steps)[4:])
        strides = [s for s in range(1, timesteps + 1) if len(range(0, timesteps, s)) == wanted]
        if not strides:
            raise UsageError(
                f"sample.steps {steps}: no whole stride takes {wanted} of {timesteps} time steps"
            )
        kept = list(range(0, timesteps, strides[0]))
    else:
        counts, kept, start = [int(count) for count in str(steps).split(",")], [], 0
        for part, count in enumerate(counts):
            size = timesteps // len(counts) + (part < timesteps % len(counts))
            _count(size, count)
            stride, place = (size - 1) / max(count - 1, 1), 0.0
            for _ in range(count):
                kept.append(start + round(place))
                place += stride
            start += size
    indices = torch.tensor(kept[::-1], dtype=torch.float64)
    return torch.cat([(indices + 1) / timesteps, torch.zeros(1, dtype=torch.float64)])


def _number(steps: int | str) -> int:
    if not isinstance(steps, int):
        raise UsageError(
            f"sample.steps {steps} is a spacing of the adm grid (sample.grid); other grids "
            "take a number"
        )
    return steps


def _count(timesteps: int, steps: int | str) -> int:
    steps = _number(steps)
    if not 1 <= steps <= timesteps:
        raise UsageError(
            f"sample.steps {steps} must lie between 1 and the process's {timesteps} time steps"
        )
    return steps


# ------------------------------------------------------------------ free times: intervals + 1, from


def uniform(process: Process, intervals: int, start: float, end: float) -> Tensor:
    return torch.linspace(start, end, intervals + 1, dtype=torch.float64)


def quadratic(process: Process, intervals: int, start: float, end: float) -> Tensor:
    """Evenly spaced in the square root of t."""
    return torch.linspace(start**0.5, end**0.5, intervals + 1, dtype=torch.float64) ** 2


def logsnr(process: Process, intervals: int, start: float, end: float) -> Tensor:
    """Evenly spaced in log(alpha / sigma) (Lu et al. 2022)."""
    first, last = process.log_snr(torch.tensor([start, end], dtype=torch.float64)).tolist()
    times = process.time_at(torch.linspace(first, last, intervals + 1, dtype=torch.float64))
    times[0], times[-1] = start, end if intervals else start
    return times


INDEX_GRIDS = {"even": even, "maskdm": maskdm, "adm": adm}
FREE_GRIDS = {"uniform": uniform, "quadratic": quadratic, "logsnr": logsnr}


def subdivide(process: Process, times: Tensor, parts: list[int]) -> Tensor:
    """Cut interval i of times [N + 1] into parts[i] equal ones in log-SNR: [sum(parts) + 1]."""
    pieces = [logsnr(process, n, *times[i : i + 2].tolist())[:-1] for i, n in enumerate(parts)]
    return torch.cat([*pieces, times[-1:]])


def grid_of(options: SampleConfig) -> str:
    """The name of the grid that a `sample` section asks for, or else the sampler's own."""
    if isinstance(options.steps, str):
        return options.grid or "adm"
    return options.grid or ("even" if options.sampler in ("ddim", "ddpm") else "logsnr")


def visited(process: Process, options: SampleConfig) -> Tensor:
    """The times of a `sample` section.

    DDIM and DDPM visit even training steps unless told otherwise, solvers even steps of log-SNR. On
    free times the multistep solvers make `steps` intervals and stop at the last time; all others
    use the last of their steps to reach the clean image.

    Raises UsageError for a spacing or a number of steps that the grid has not, and for an end
    without noise.
    """
    solver = options.sampler in ("dpm_solver", "dpm_solver++", "unipc")
    if (grid := grid_of(options)) in INDEX_GRIDS:
        return (
            INDEX_GRIDS[grid](process.timesteps, options.steps)
            .clamp(max=process.latest)
            .unique_consecutive()
        )
    steps = _number(options.steps)
    ends = (process.latest, options.end or process.earliest)
    if not process.log_snr(torch.tensor(ends[1], dtype=torch.float64)).isfinite():
        near = f"end at {process.earliest:g} or later"
        raise UsageError(f"sample.end {ends[1]:g} is free of noise in this process: {near}")
    zero = torch.zeros(1, dtype=torch.float64)
    if not solver:
        return torch.cat([FREE_GRIDS[grid](process, steps - 1, *ends), zero])
    if options.sampler != "unipc" and options.method in ("singlestep", "fast"):
        orders = solver_orders(options.method, steps, options.order)
        # U-ViT's fast solver on even times goes through a fine grid; DPM-Solver-fast cuts equal
        # steps of log-SNR.
        if options.method == "fast" and grid != "logsnr":
            times = FREE_GRIDS[grid](process, steps, *ends)
        else:
            times = subdivide(process, FREE_GRIDS[grid](process, len(orders), *ends), orders)
    else:
        times = FREE_GRIDS[grid](process, steps, *ends)
    return torch.cat([times, zero]) if options.denoise_to_zero else times


def solver_orders(method: str, evaluations: int, order: int) -> list[int]:
    """The orders of a singlestep solver's steps, each of which takes as many evaluations as its
    order.

    `singlestep`: all of one order, as many as fit. `fast`: all evaluations are used, the last ones
    at lower order (Lu et al. 2022, appendix D.3). Raises UsageError for fewer evaluations than one
    step of `singlestep` takes.
    """
    if method == "singlestep":
        if evaluations < order:
            raise UsageError(
                f"sample.steps {evaluations} are fewer than one step of sample.order {order} takes"
            )
        return [order] * (evaluations // order)
    full, rest = divmod(evaluations, order)
    if order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + [rest] * bool(rest)
