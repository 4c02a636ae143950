"""How training times are drawn."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.diffusion.schedules import Schedule, Table
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import ProcessConfig

Draw = Callable[..., torch.Generator]
"""(purpose[, device]) -> the generator for this batch, on the given device or the batch's own."""


class TimeSampling(Protocol):
    """Draws the times of a batch."""

    def draw(self, n: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """n training times [n] and the weight of each loss [n] or [], float32."""


@register("time_sampling", "uniform")
class Uniform:
    """Every time alike."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def draw(self, n: int, draw: Draw) -> tuple[Tensor, Tensor]:
        generator = draw("time")
        times = self.schedule.uniform_times(n, generator)
        return times, torch.ones((), device=generator.device)


@register("time_sampling", "stratified")
class Stratified(Uniform):
    """One from each of n equal parts of the range, in shuffled order."""

    def draw(self, n: int, draw: Draw) -> tuple[Tensor, Tensor]:
        generator = draw("time")
        device = generator.device
        inside = torch.rand(n, generator=generator, device=device)
        u = (torch.arange(n, device=device) + inside) / n
        order = torch.randperm(n, generator=generator, device=device)
        return self.schedule.times_of(u[order]), torch.ones((), device=device)


class _ByNoise:
    """Times whose log-SNR is drawn: where the schedule has it, or its nearest training step."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def log_snr(self, n: int, draw: Draw) -> Tensor:
        """[n] float64 on the CPU."""
        raise NotImplementedError

    def draw(self, n: int, draw: Draw) -> tuple[Tensor, Tensor]:
        schedule = self.schedule
        times = schedule.time_at(self.log_snr(n, draw))
        if isinstance(schedule, Table):
            times = (times * schedule.timesteps).round() / schedule.timesteps
        times = times.clamp(schedule.earliest, schedule.latest)
        return times.float(), torch.ones(())


class LogitNormalOptions(Options):
    time_mean: float = Field(
        0.0, description="The mean of the normal numbers n in t = sigmoid(n); above 0 is noisier."
    )
    time_std: float = Field(
        1.0, gt=0, description="The standard deviation of the normal numbers n."
    )
    time_shift: float = Field(
        1.0,
        gt=0,
        description="The shift s in t <- s t / (1 + (s - 1) t); above 1 is noisier, for larger "
        "images.",
    )
    time_uniform: float = Field(
        0.0, ge=0, le=1, description="The share of times that are drawn uniformly instead."
    )


@register("time_sampling", "logit_normal", LogitNormalOptions)
class LogitNormal(_ByNoise):
    """A flow's times t = sigmoid(n), n normal (Esser et al. 2024), or those of another schedule
    with the same noise.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        time_mean: float,
        time_std: float,
        time_shift: float,
        time_uniform: float,
    ) -> None:
        super().__init__(schedule)
        self.mean, self.std, self.uniform = time_mean, time_std, time_uniform
        self.raised = math.log(time_shift)

    def log_snr(self, n: int, draw: Draw) -> Tensor:
        generator = draw("time", "cpu")
        logit = self.mean + self.std * torch.randn(n, generator=generator, dtype=torch.float64)
        if self.uniform:
            even = torch.rand(n, generator=generator, dtype=torch.float64).logit()
            chosen = torch.rand(n, generator=generator) < self.uniform
            logit = torch.where(chosen, even, logit)
        return -2 * (logit + self.raised)


class LogNormalOptions(Options):
    sigma_mean: float = Field(-1.2, description="The mean of ln(sigma / alpha).")
    sigma_std: float = Field(1.2, gt=0, description="The standard deviation of ln(sigma / alpha).")


@register("time_sampling", "log_normal", LogNormalOptions)
class LogNormal(_ByNoise):
    """Normal ln(sigma / alpha) (EDM; Karras et al. 2022, table 1)."""

    def __init__(self, schedule: Schedule, *, sigma_mean: float, sigma_std: float) -> None:
        super().__init__(schedule)
        self.mean, self.std = sigma_mean, sigma_std

    def log_snr(self, n: int, draw: Draw) -> Tensor:
        normal = torch.randn(n, generator=draw("time", "cpu"), dtype=torch.float64)
        return -2 * (self.mean + self.std * normal)


RECORDED = 10
"""Losses remembered for each time."""

UNIFORM = 0.001
"""Share of the draws that stays uniform."""


@register("time_sampling", "loss_second_moment")
class LossSecondMoment:
    """Times in proportion to sqrt(E[L_t^2]) of their last losses (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every time has its ten losses. Lives on the CPU, where a draw costs nothing; its
    history belongs to a run's checkpoint. Raises UsageError for a schedule without training steps.
    """

    def __init__(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Table):
            raise UsageError(
                "process.time_sampling 'loss_second_moment' needs a schedule of discrete steps"
            )
        self.losses = np.zeros((schedule.timesteps, RECORDED))
        self.counts = np.zeros(schedule.timesteps, dtype=np.int64)
        # Replaced in a training of several processes, which share one history.
        self.gather: Callable[[Tensor], Tensor] = lambda values: values

    def weights(self) -> np.ndarray:
        """What each time is drawn in proportion to, [T] float64; ones until the history is full."""
        if (self.counts < RECORDED).any():
            return np.ones(len(self.counts))
        moments = np.sqrt(np.mean(self.losses**2, axis=1))
        return moments / moments.sum() * (1 - UNIFORM) + UNIFORM / len(self.counts)

    def draw(self, n: int, draw: Draw) -> tuple[Tensor, Tensor]:
        """n times [n] in {1/T, ..., 1} and their importance weights 1 / (T p) [n], float32."""
        p = torch.from_numpy(self.weights())
        p = p / p.sum()
        k = torch.multinomial(p, n, replacement=True, generator=draw("time", "cpu"))
        return (k + 1).float() / len(p), (1 / (len(p) * p[k])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses [n] of the times t [n], of all processes, in order."""
        t, losses = self.gather(t), self.gather(losses)
        indices = (t * len(self.counts)).round().long().cpu() - 1
        for k, loss in zip(indices.tolist(), losses.double().cpu().tolist(), strict=True):
            if not math.isfinite(loss):
                continue  # its step is left out too, or stops the training
            if self.counts[k] == RECORDED:
                self.losses[k, :-1] = self.losses[k, 1:]
                self.losses[k, -1] = loss
            else:
                self.losses[k, self.counts[k]] = loss
                self.counts[k] += 1

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"losses": torch.from_numpy(self.losses), "counts": torch.from_numpy(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.counts = state["losses"].numpy(), state["counts"].numpy()


def build(config: ProcessConfig, schedule: Schedule) -> TimeSampling:
    """The time sampling that a `process` section asks for."""
    entry = registry.find("time_sampling", config.time_sampling, "process.time_sampling")
    return entry.make(schedule, **entry.takes(config))
