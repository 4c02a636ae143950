"""The steps that a budget gives every stage of every arm."""

import math
import statistics as averages
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.bench import training as bench
from msmdiff.core.compare.spec import Budget, Spec
from msmdiff.core.config import Config
from msmdiff.core.data.loader import open_training
from msmdiff.core.diffusion import masking
from msmdiff.core.errors import UsageError
from msmdiff.core.training import cost, launch

TIMING_ROUNDS, TIMING_STEPS = 3, 4
"""How often every pace is timed, in alternation, and over how many steps."""


@dataclass
class Stage:
    """One training of a chain.

    Attributes:
        config: resolved; its `train.steps` is the plan's.
        seconds_per_step: as timed; 0 where the budget needs no timing.
        flops_per_step: mean over the stage's changing mask.
    """

    config: Config
    seconds_per_step: float
    flops_per_step: float

    @property
    def steps(self) -> int:
        return self.config.train.steps


@dataclass
class Arm:
    """A name and its stages."""

    name: str
    stages: list[Stage]


def plan(spec: Spec, note: Callable[[str], None]) -> list[Arm]:
    """The arms with the steps that the budget gives each of their stages.

    Raises UsageError for a configuration or shares that do not fit together.
    """
    arms: list[Arm] = []
    shares: list[list[float]] = []
    for name, stages in spec.arms.items():
        given = [stage.get("share", 1 / len(stages)) for stage in stages]
        if not math.isclose(sum(given), 1, abs_tol=1e-6) or min(given) <= 0:
            raise UsageError(f"arms.{name}: the shares {given} of its stages must add up to 1")
        shares.append(given)
        made = [_config(f"arms.{name}", stage, spec) for stage in stages]
        arms.append(Arm(name, [Stage(config, 0.0, _flops(config)) for config in made]))
    if spec.budget.seconds is not None:
        note(f"timing the steps of {len(arms)} arms in alternation")
        _time(arms)
    for arm, given in zip(arms, shares, strict=True):
        for stage, share in zip(arm.stages, given, strict=True):
            stage.config.train.steps = _steps(spec.budget, stage, share)
            stage.config.train.checkpoint_every = max(1, stage.steps // 10)
    return arms


def _config(where: str, stage: dict[str, Any], spec: Spec) -> Config:
    """A stage's configuration: resolved, without pictures or measurements of its own."""
    layers = [presets.read(stage["config"])] if stage.get("config") else []
    own = {key: value for key, value in stage.items() if key not in ("config", "share")}
    quiet = {"train": {"preview_every": 0}, "eval": {"every": 0}}
    try:
        config = configuration.build(*layers, spec.common, own, quiet)
        source = open_training(config.data, lambda text: None)
        config = road.resolve(config, source.num_classes)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config.train.precision = launch.choose_precision(config, device)
    return config


def _pieces(config: Config) -> Iterator[tuple[float, Config]]:
    """(share of the training, configuration with that ratio) of a mask that changes."""
    ratios = masking.over_training(config.mask)
    ends = [start for start, _ in ratios[1:]] + [1.0]
    for (start, ratio), end in zip(ratios, ends, strict=True):
        piece = config.model_copy(deep=True)
        piece.mask.ratio, piece.mask.tail, piece.mask.schedule = ratio, 0.0, "constant"
        if not masking.hides(piece.mask) and piece.objective.name in ("msm", "maskdit"):
            piece.objective = configuration.section("objective", name="dsm")
        yield end - start, piece


def _flops(config: Config) -> float:
    images = config.train.batch_size
    return sum(share * images * cost.measure(piece).step_flops for share, piece in _pieces(config))


def _time(arms: Sequence[Arm]) -> None:
    """Time every kind of step, all in turn, several times; the median counts."""
    pieces = [
        (stage, share, piece)
        for arm in arms
        for stage in arm.stages
        for share, piece in _pieces(stage.config)
    ]
    times: list[list[float]] = [[] for _ in pieces]
    for _ in range(TIMING_ROUNDS):
        for (_, _, piece), found in zip(pieces, times, strict=True):
            found.append(bench.training_step(piece, TIMING_STEPS, peak=1.0).ms_per_step / 1000)
    for (stage, share, _), found in zip(pieces, times, strict=True):
        stage.seconds_per_step += share * averages.median(found)


def _steps(budget: Budget, stage: Stage, share: float) -> int:
    if budget.images is not None:
        steps = share * budget.images / stage.config.train.batch_size
    elif budget.flops is not None:
        steps = share * budget.flops / stage.flops_per_step
    else:
        assert budget.seconds is not None
        steps = share * budget.seconds / stage.seconds_per_step
    return max(1, round(steps))
