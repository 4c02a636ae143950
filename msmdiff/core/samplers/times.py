"""Which times a sampler visits, from pure noise (t = 1) down to the clean image (t = 0), as falling
float64 tensors.

Index times are training steps and end with the clean image; free times lie anywhere, and end where
the sampler's plan or `end` says. A new kind is one function, registered under "times".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.diffusion.schedules import Schedule
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import SampleConfig


@dataclass(frozen=True)
class Plan:
    """Which times suit a sampler.

    Attributes:
        default: the times it takes unless others are asked for.
        stops: on free times it makes `steps` intervals and stops at the last one; all others use
            the last of their steps to reach the clean image.
        lay: for a sampler that evaluates inside its steps: (schedule, entry of the times, `sample`
            section, (start, end)) -> all times that it visits.
    """

    default: str = "logsnr"
    stops: bool = False
    lay: Callable[..., Tensor] | None = None


F = TypeVar("F", bound=Callable[..., Any])


def planned(plan: Plan) -> Callable[[F], F]:
    """Say which times suit a sampler; without, those of `Plan()` do."""

    def remember(sampler: F) -> F:
        sampler.plan = plan  # type: ignore[attr-defined]
        return sampler

    return remember


# ------------------------------------------------------------------ index times


@register("times", "even")
def even(timesteps: int, steps: int | str) -> Tensor:
    """Training steps, evenly spaced: [steps + 1], from 1 to 0."""
    k = torch.linspace(timesteps, 0, _count(timesteps, steps) + 1, dtype=torch.float64).round()
    return k / timesteps


@register("times", "maskdm")
def maskdm(timesteps: int, steps: int | str) -> Tensor:
    """MaskDM's DDIM steps: the integer part of a float32 linspace(-1, T - 1, steps + 1).

    Index -1 is the clean image.
    """
    count = _count(timesteps, steps)
    places = torch.linspace(-1, timesteps - 1, count + 1, dtype=torch.float32)
    return (places.int().flip(0).double() + 1) / timesteps


@register("times", "adm")
def adm(timesteps: int, steps: int | str) -> Tensor:
    """ADM's respaced training steps (Nichol & Dhariwal 2021), then clean.

    `250`: so many evenly rounded indices from 0 to T - 1. `10,20,30`: so many in each third.
    `ddim25`: the integer stride from 0 that gives 25. Raises UsageError where there is none, or a
    part has fewer indices.
    """
    if str(steps).startswith("ddim"):
        kept = _strided(timesteps, str(steps))
    else:
        kept = _in_parts(timesteps, [int(count) for count in str(steps).split(",")])
    indices = torch.tensor(kept[::-1], dtype=torch.float64)
    return torch.cat([(indices + 1) / timesteps, torch.zeros(1, dtype=torch.float64)])


def _strided(timesteps: int, spacing: str) -> list[int]:
    wanted = int(spacing.removeprefix("ddim"))
    for stride in range(1, timesteps + 1):
        kept = list(range(0, timesteps, stride))
        if len(kept) == wanted:
            return kept
    raise UsageError(
        f"sample.steps {spacing}: no whole stride takes {wanted} of {timesteps} time steps"
    )


def _in_parts(timesteps: int, counts: list[int]) -> list[int]:
    kept: list[int] = []
    start = 0
    for part, count in enumerate(counts):
        size = timesteps // len(counts) + (part < timesteps % len(counts))
        _count(size, count)
        stride, place = (size - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return kept


def _number(steps: int | str) -> int:
    if not isinstance(steps, int):
        raise UsageError(
            f"sample.steps {steps} is a spacing of the adm times (sample.times); others take a "
            "number"
        )
    return steps


def _count(timesteps: int, steps: int | str) -> int:
    steps = _number(steps)
    if not 1 <= steps <= timesteps:
        raise UsageError(
            f"sample.steps {steps} must lie between 1 and the process's {timesteps} time steps"
        )
    return steps


# ------------------------------------------------------------------ free times


class FreeOptions(Options):
    end: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The last time that is visited; null takes the process's first step.",
    )


@register("times", "uniform", FreeOptions)
def uniform(schedule: Schedule, intervals: int, start: float, end: float) -> Tensor:
    """Evenly spaced in t."""
    return torch.linspace(start, end, intervals + 1, dtype=torch.float64)


@register("times", "quadratic", FreeOptions)
def quadratic(schedule: Schedule, intervals: int, start: float, end: float) -> Tensor:
    """Evenly spaced in the square root of t."""
    return torch.linspace(start**0.5, end**0.5, intervals + 1, dtype=torch.float64) ** 2


@register("times", "logsnr", FreeOptions)
def logsnr(schedule: Schedule, intervals: int, start: float, end: float) -> Tensor:
    """Evenly spaced in log(alpha / sigma) (Lu et al. 2022)."""
    first, last = schedule.log_snr(torch.tensor([start, end], dtype=torch.float64)).tolist()
    times = schedule.time_at(torch.linspace(first, last, intervals + 1, dtype=torch.float64))
    times[0], times[-1] = start, end if intervals else start
    return times


class ShiftedOptions(FreeOptions):
    shift: float = Field(
        3.0,
        gt=0,
        description="How much noisier than even times they are: the factor of sigma / alpha.",
    )


@register("times", "shifted", ShiftedOptions)
def shifted(
    schedule: Schedule, intervals: int, start: float, end: float, *, shift: float
) -> Tensor:
    """Even times with `shift` times the noise: of a flow t <- s t / (1 + (s - 1) t) (Esser et al.
    2024, eq. 23); for larger images, and networks that were trained with such a shift.
    """
    even_times = uniform(schedule, intervals, start, end)
    times = schedule.time_at(schedule.log_snr(even_times) - 2 * math.log(shift))
    times[0], times[-1] = start, end if intervals else start
    return times


class KarrasOptions(FreeOptions):
    rho: float = Field(
        7.0,
        ge=0.1,
        le=1000,
        description="The exponent: steps are even in (sigma / alpha)^(1/rho); the larger, the "
        "finer near the image.",
    )


@register("times", "karras", KarrasOptions)
def karras(schedule: Schedule, intervals: int, start: float, end: float, *, rho: float) -> Tensor:
    """EDM's (Karras et al. 2022, eq. 5): even in a power of the noise level sigma / alpha, on any
    schedule; on `edm` of the same rho they are the uniform ones.
    """
    ends = torch.tensor([start, end], dtype=torch.float64)
    first, last = (-schedule.log_snr(ends) / (2 * rho)).exp().tolist()
    roots = torch.linspace(first, last, intervals + 1, dtype=torch.float64)
    times = schedule.time_at(-2 * rho * roots.log())
    times[0], times[-1] = start, end if intervals else start
    return times


def subdivide(schedule: Schedule, times: Tensor, parts: list[int]) -> Tensor:
    """Cut interval i of times [N + 1] into parts[i] equal ones in log-SNR: [sum(parts) + 1]."""
    pieces = []
    for i, count in enumerate(parts):
        start, end = times[i : i + 2].tolist()
        pieces.append(logsnr(schedule, count, start, end)[:-1])
    return torch.cat([*pieces, times[-1:]])


# ------------------------------------------------------------------ what a section asks for


def visited(schedule: Schedule, section: SampleConfig) -> Tensor:
    """The times that the sampler of a `sample` section visits.

    DDIM and DDPM visit even training steps unless told otherwise, solvers even steps of log-SNR.

    Raises UsageError for a spacing or a number of steps that the times have not, and for an end
    that means nothing or is free of noise.
    """
    sampler = registry.find("sampler", section.sampler, "sample.sampler")
    plan: Plan = getattr(sampler.make, "plan", Plan())
    spaced = "adm" if isinstance(section.steps, str) else plan.default
    entry = registry.find("times", section.times or spaced, "sample.times")
    end = getattr(section, "end", None)
    if not issubclass(entry.options, FreeOptions):
        if end is not None:
            raise UsageError(f"sample.end {end:g} has no effect on the times {entry.name}")
        times = entry.make(schedule.timesteps, section.steps)
        return times.clamp(max=schedule.latest).unique_consecutive()
    own = {key: value for key, value in entry.takes(section).items() if key != "end"}
    entry = replace(entry, make=partial(entry.make, **own))
    return _free(schedule, section, entry, plan)


def _free(schedule: Schedule, section: SampleConfig, entry: registry.Entry, plan: Plan) -> Tensor:
    steps = _number(section.steps)
    start, end = schedule.latest, getattr(section, "end", None) or schedule.earliest
    if not schedule.log_snr(torch.tensor(end, dtype=torch.float64)).isfinite():
        near = f"end at {schedule.earliest:g} or later"
        raise UsageError(f"sample.end {end:g} is free of noise in this process: {near}")
    clean = torch.zeros(1, dtype=torch.float64)
    if not plan.stops:
        return torch.cat([entry.make(schedule, steps - 1, start, end), clean])
    if plan.lay is not None:
        times = plan.lay(schedule, entry, section, (start, end))
    else:
        times = entry.make(schedule, steps, start, end)
    return torch.cat([times, clean]) if getattr(section, "denoise_to_zero", False) else times
