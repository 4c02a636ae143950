"""How training times are drawn."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.diffusion.schedules import Schedule, Table
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import register
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
