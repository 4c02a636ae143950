"""The steps that a budget gives every stage of every arm."""

import math
import statistics as averages
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.bench import timing
from msmdiff.core.bench import training as bench
from msmdiff.core.compare.spec import Budget, Spec
from msmdiff.core.config import Config
from msmdiff.core.data.checking import open_training
from msmdiff.core.data.loader import TrainingImages, batches
from msmdiff.core.data.order import Chunks
from msmdiff.core.diffusion import codecs, masking
from msmdiff.core.errors import UsageError
from msmdiff.core.training import cost, launch, validation

TIMING_ROUNDS, TIMING_STEPS, TIMING_WARMUP = 3, 5, 2
"""How often every pace is timed, in alternation, over how many steps, and after how many others."""


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

    @property
    def images(self) -> int:
        return self.steps * self.config.train.batch_size


@dataclass
class Arm:
    """A name and its stages."""

    name: str
    stages: list[Stage]

    def masking(self) -> dict[str, Any]:
        """How it hides tokens: `tokens` of an image, the `hidden` share of them and the `route`
        (or the objective that has one) at the start, and the `unmasked` share of the images seen.
        """
        first = self.stages[0].config
        counted = cost.measure(first)
        route = first.objective.name if first.mask.route == "auto" else first.mask.route
        bare = sum(
            stage.images * share
            for stage in self.stages
            for share, piece in cost.pieces(stage.config)
            if not masking.hides(piece.mask)
        )
        return {
            "tokens": counted.tokens,
            "hidden": 1 - counted.kept / counted.tokens,
            "route": route if counted.kept < counted.tokens else None,
            "unmasked": round(bare / sum(stage.images for stage in self.stages), 6),
        }


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
        arms.append(
            Arm(
                name,
                [
                    Stage(config, 0.0, config.train.batch_size * cost.flops_per_image(config))
                    for config in made
                ],
            )
        )
    if spec.budget.seconds is not None:
        note(f"timing the steps of {len(arms)} arms in alternation")
        _time(arms)
    for arm, given in zip(arms, shares, strict=True):
        for stage, share in zip(arm.stages, given, strict=True):
            stage.config.train.steps = _steps(spec.budget, stage, share)
            stage.config.train.checkpoint_every = max(1, stage.steps // spec.checkpoints)
    return arms


def _config(where: str, stage: dict[str, Any], spec: Spec) -> Config:
    """A stage's configuration: resolved, without pictures or measurements of its own."""
    layers = [presets.read(stage["config"])] if stage.get("config") else []
    own = {key: value for key, value in stage.items() if key not in ("config", "share")}
    quiet = {"train": {"preview_every": 0}, "eval": {"every": 0, "heldout_every": 0}}
    try:
        given = configuration.build(*layers, spec.common, own, quiet)
        source = open_training(given.data, lambda text: None)
        config = road.resolve(given, source.num_classes)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    # A decay goes to the end of a training, which the plan has yet to tell.
    config.optim.decay_steps = given.optim.decay_steps
    if spec.measure.by == "heldout" and validation.source_of(config) is None:
        raise UsageError(
            f"{where}: measure.by heldout needs images that are not trained on: set eval.heldout"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config.train.precision = launch.choose_precision(config, device)
    return config


def _step_flops(config: Config) -> float:
    return config.train.batch_size * cost.flops_per_image(config)


def _time(arms: Sequence[Arm]) -> None:
    """Time every kind of step, all in turn, several times, on the data themselves; the median
    counts.
    """
    images: dict[str, TrainingImages] = {}
    trainings = [
        (stage, share, _training(piece, images))
        for arm in arms
        for stage in arm.stages
        for share, piece in cost.pieces(stage.config)
    ]
    times: list[list[float]] = [[] for _ in trainings]
    for _ in range(TIMING_ROUNDS):
        for (_, _, training), found in zip(trainings, times, strict=True):
            found.append(_pace(training))
    for (stage, share, _), found in zip(trainings, times, strict=True):
        stage.seconds_per_step += share * averages.median(found)


def _training(config: Config, images: dict[str, TrainingImages]) -> bench.Training:
    """A training of one kind of step; those on the same images share them in `images`."""
    space = codecs.build(config.codec, config.data.image_size)
    if codecs.open_measures(config.codec, space):
        return bench.Training(config)  # what it would measure of the data is not known here
    place = config.data.model_dump_json()
    if place not in images:
        source = open_training(config.data, lambda text: None)
        images[place] = TrainingImages(source, config.data, seed=0)
    # Else whoever is timed first would decode the images for the others.
    calls = TIMING_ROUNDS * (TIMING_WARMUP + TIMING_STEPS)
    images[place].crop_ahead(range(calls * config.train.batch_size))
    micro, _ = launch.shares(config.train, 1)
    chunks = Chunks(
        images_seen=0,
        batch_size=config.train.batch_size,
        micro_batch_size=micro,
        rank=0,
        world=1,
    )
    return bench.Training(config, batches(images[place], chunks, torch.cuda.is_available()))


def _pace(training: bench.Training) -> float:
    """Seconds of a step: their mean, since slow ones count in a training too."""
    taken = timing.each_second(training, training.device, TIMING_STEPS, TIMING_WARMUP)
    return averages.fmean(taken)


def _steps(budget: Budget, stage: Stage, share: float) -> int:
    if budget.images is not None:
        steps = share * budget.images / stage.config.train.batch_size
    elif budget.flops is not None:
        steps = share * budget.flops / stage.flops_per_step
    else:
        assert budget.seconds is not None
        steps = share * budget.seconds / stage.seconds_per_step
    return max(1, round(steps))
