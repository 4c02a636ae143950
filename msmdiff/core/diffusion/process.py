"""The process: a schedule, a prediction and a loss weight, together.

The one place where x_t is made, the network is fed, and its output is split into x0 and eps.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.diffusion.predictions import Estimate, Prediction
from msmdiff.core.diffusion.schedules import Schedule, Table, spread
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import ProcessConfig

Denoiser = Callable[..., Estimate]
"""(x_t [B, C, H, W], t) -> what it makes of it; t is a float64 number on the CPU, or [B] on x_t's
device. A denoiser that knows average velocities takes a third argument, like t: the time that a
step goes to."""

Noise = Callable[[], Tensor]
"""The next Gaussian noise [B, C, H, W]."""

Network = Callable[..., Tensor]
"""(x, network time [B], condition, route) -> output."""


def call(
    network: Network, x: Tensor, time: Tensor, condition: Any, route: Any, **more: Any
) -> Tensor:
    """Call a network; functions that know no routes are called without one."""
    told = (x, time, condition) if route is None else (x, time, condition, route)
    return network(*told, **{name: value for name, value in more.items() if value is not None})


class Weighting(Protocol):
    """How much each time counts in the loss."""

    def __call__(self, schedule: Schedule, prediction: Prediction, t: Tensor) -> Tensor:
        """t [B] -> the weight of each, [B], in t's dtype."""


class Process:
    """A schedule, a prediction and a loss weight."""

    def __init__(self, schedule: Schedule, prediction: Prediction, weighting: Weighting) -> None:
        self.schedule, self.prediction, self.weighting = schedule, prediction, weighting

    def to(self, device: torch.device | str) -> "Process":
        """Put what the schedule computes with on a device; returns self."""
        self.schedule.to(device)
        return self

    def table(self, what: str) -> Table:
        """The schedule, where it is a table of training steps. Raises UsageError naming `what`."""
        if not isinstance(self.schedule, Table):
            raise UsageError(f"{what} needs a schedule of discrete steps (process.schedule)")
        return self.schedule

    def add_noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t for x0, eps [B, ...] and t [B]."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return spread(alpha, x0) * x0 + spread(sigma, x0) * eps

    def feed(
        self,
        network: Network,
        x_t: Tensor,
        t: Tensor,
        condition: Any = None,
        route: Any = None,
        *,
        until: Tensor | None = None,
        velocity: bool | None = None,
    ) -> Any:
        """The network's output at x_t [B, C, H, W], t [B] or one number for all.

        Args:
            until: like t: the time that a step goes to, for a prediction of average velocities.
            velocity: ask for the pair of a network with a velocity head.

        Raises UsageError for `until` where the prediction is of one time.
        """
        x, time = self.prediction.inputs(x_t, t)
        interval = None if until is None else self._interval(t, until)
        if t.ndim == 0:
            time = torch.full((len(x_t),), time.item(), device=x_t.device)
            if interval is not None:
                interval = torch.full((len(x_t),), interval.item(), device=x_t.device)
        return call(network, x, time, condition, route, interval=interval, velocity=velocity)

    def _interval(self, t: Tensor, until: Tensor) -> Tensor:
        known = getattr(self.prediction, "interval", None)
        if known is None:
            raise UsageError(
                "this network predicts for one time, and the sampler meanflow asks for the average "
                "over a step: it is for networks trained with objective.name meanflow"
            )
        return known(t, until)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output, in x0's shape."""
        return self.prediction.target(x0, eps, t)

    def split(self, output: Tensor, x_t: Tensor, t: Tensor) -> Estimate:
        """The network's output at x_t [B, C, ...], t [B] or [] -> x0 and eps in x_t's shape.

        An output of 2C channels carries the learned variance in the second half (Nichol & Dhariwal
        2021, eq. 15), which belongs to a step of a table.
        """
        learned: dict[str, Tensor] = {}
        if output.shape[1] == 2 * x_t.shape[1]:
            output, value = output.chunk(2, dim=1)
            variance = (value + 1) / 2
            bounds = self.table("a learned variance").log_variance_bounds(t)
            low, high = (spread(bound, x_t) for bound in bounds)
            learned = {"variance": variance, "log_variance": variance * high + (1 - variance) * low}
        return Estimate(*self.prediction.split(output, x_t, t), **learned)

    def eps_from_x0(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that makes x_t out of x0."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (x_t - spread(alpha, x_t) * x0) / spread(sigma, x_t)

    def weight(self, t: Tensor) -> Tensor:
        """The loss weight of each t [B]."""
        return self.weighting(self.schedule, self.prediction, t)


# ------------------------------------------------------------------ weightings


@register("weighting", "uniform")
def uniform() -> Weighting:
    """Every time counts alike, in the space of the prediction."""

    def weight(schedule: Schedule, prediction: Prediction, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    return weight


class MinSnrOptions(Options):
    min_snr_gamma: float = Field(
        5.0, gt=0, description="The largest weight of a time, in the space of x0."
    )


@register("weighting", "min_snr", MinSnrOptions)
def min_snr(*, min_snr_gamma: float) -> Weighting:
    """min(SNR, gamma) in x0 space, divided by what the prediction counts for (Hang et al. 2023)."""

    def weight(schedule: Schedule, prediction: Prediction, t: Tensor) -> Tensor:
        snr = schedule.log_snr(t).exp()
        return snr.clamp(max=min_snr_gamma) / prediction.snr_weight(snr)

    return weight


class VelocityOptions(Options):
    velocity_floor: float = Field(
        0.05, ge=1e-4, lt=1, description="The time below which the weight rises no more."
    )


@register("weighting", "velocity", VelocityOptions)
def velocity(*, velocity_floor: float) -> Weighting:
    """An error of x0 counts as that of the velocity dx/dt which follows from it: over max(t,
    floor)^2 on the flow (JiT; Li & He 2025).
    """

    def weight(schedule: Schedule, prediction: Prediction, t: Tensor) -> Tensor:
        held = t.double().clamp(min=velocity_floor)
        alpha, sigma = schedule.alpha_sigma(held)
        of_x0, of_eps = schedule.rates(held)
        slope = of_x0 - of_eps * alpha / sigma  # d velocity / d x0 at a given x_t
        snr = schedule.log_snr(t).exp()
        return slope.square().to(t.dtype) / prediction.snr_weight(snr)

    return weight


LARGE_TARGET = 10.0
"""Targets of this size, of an image and noise of size 1, make a loss that is all scale."""


def unsuited(config: ProcessConfig) -> list[str]:
    """A sentence where the prediction's targets are too large to learn from, as velocities are of
    noise that rises to 80.
    """
    made = build(config)
    t = torch.linspace(made.schedule.earliest, made.schedule.latest, 100, dtype=torch.float64)
    ones = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    size = made.target(ones, -ones, t).square().mean().sqrt().item()
    if not size > LARGE_TARGET:
        return []
    return [
        f"process.prediction {config.prediction} asks for numbers of about {size:,.0f} on "
        f"process.schedule {config.schedule}, and the loss is of their squares: predictions that "
        "suit a schedule stand in docs/training.md"
    ]


def build(config: ProcessConfig) -> Process:
    """The process a configuration asks for."""
    schedule = registry.find("schedule", config.schedule, "process.schedule")
    prediction = registry.find("prediction", config.prediction, "process.prediction")
    weighting = registry.find("weighting", config.weighting, "process.weighting")
    made = schedule.make(config.timesteps, **schedule.takes(config))
    meaning = prediction.make(made, **prediction.takes(config))
    return Process(made, meaning, weighting.make(**weighting.takes(config)))
