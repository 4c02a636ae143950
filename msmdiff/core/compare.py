"""Several trainings under one budget: arms that take turns in short slices, so that whatever else
the machine does hits all of them alike.

A comparison is planned first: a budget of seconds or FLOPs becomes a number of steps for every
stage of every arm, of paces that are timed in alternation. From then on it is deterministic, and a
comparison that was killed goes on to the same bits.
"""

import json
import math
import statistics as averages
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy import stats

from msmdiff.core import bench, files, presets, registry
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import Config
from msmdiff.core.data.loader import open_training
from msmdiff.core.diffusion import masking
from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import evaluate, features, inputs, scores
from msmdiff.core.training import cost, launch, previews
from msmdiff.core.training.run import Reporter, Summary
from msmdiff.core.training.trainer import Trainer

TIMING_ROUNDS, TIMING_STEPS = 3, 4
"""How often every pace is timed, in alternation, and over how many steps."""


# ------------------------------------------------------------------ what a file asks for


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Budget(_Strict):
    """What every arm gets with one seed: exactly one of these."""

    seconds: float | None = Field(None, gt=0, description="of stepping, at the paces timed")
    flops: float | None = Field(None, gt=0, description="of forward and backward passes, counted")
    images: int | None = Field(None, gt=0, description="seen in training")

    @model_validator(mode="after")
    def _one(self) -> "Budget":
        if sum(value is not None for value in (self.seconds, self.flops, self.images)) != 1:
            raise ValueError("give one of seconds, flops and images")
        return self


class Measure(_Strict):
    """How an arm is judged."""

    points: int = Field(4, ge=1, le=100, description="measurements along the budget")
    n: int = Field(500, ge=2, description="samples of each")
    features: str = Field("pixel", description="what images are compared by")
    weights: str | None = Field(None, description="the features' weights file")
    reference: str = Field("digits:test", description="images or statistics to compare with")


class Spec(_Strict):
    """A comparison: arms by name, each a configuration or a list of stages, with the keys of a
    configuration, `config` (a preset or file under them) and `share` (of the budget).
    """

    arms: dict[str, list[dict[str, Any]]] = Field(min_length=1)
    budget: Budget
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="of each arm")
    slice: float = Field(3.0, gt=0, description="seconds of an arm's turn")
    common: dict[str, Any] = Field({}, description="keys of all arms, over their own")
    sweep: list[float] = Field([], description="learning rates that every arm tries with seed one")
    measure: Measure = Measure()

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("arms"), dict):
            arms = content["arms"].items()
            listed = {k: [v or {}] if not isinstance(v, list) else v for k, v in arms}
            content = {**content, "arms": listed}
        return content


def read(path: Path) -> Spec:
    """The comparison that a YAML file asks for. Raises UsageError naming the file."""
    files.require_regular(path)
    with files.reading(path, "a comparison in YAML"):
        text = path.read_text(encoding="utf-8")
    try:
        return Spec.model_validate(presets.parse_yaml(text, str(path)))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise UsageError(f"{path}: {problems}") from None


# ------------------------------------------------------------------ the plan


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
        config = configuration.build(*layers, own, spec.common, quiet)
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


# ------------------------------------------------------------------ one arm's training


@dataclass
class Point:
    """A measurement along an arm's budget; what it has cost until then."""

    passed: float
    seconds: float
    images: int
    flops: float
    value: float


@dataclass
class Turn:
    """One slice: whose, in which round, its steps and its seconds."""

    arm: str
    seed: int
    round: int
    stage: int
    steps: int
    seconds: float
    flops: float


@dataclass
class Judge:
    """What samples are measured by: feature network, reference, how many."""

    network: Any
    reference: Any
    n: int

    @classmethod
    def of(cls, measure: Measure, size: int, device: torch.device) -> "Judge":
        """Measures the reference once. Raises UsageError for what cannot be had."""
        weights = Path(measure.weights) if measure.weights else None
        options = registry.find("features", measure.features, "measure.features").options()
        network = features.build(measure.features, weights, device, **options.model_dump())
        opened = inputs.open_input(measure.reference, crop=size)
        stored = opened.stored or evaluate.of_input(opened, network)
        return cls(network, stored, measure.n)

    def value(self, model: Any, seed: int) -> float:
        """The distance of samples, of seeds of this arm's seed alone."""
        drawn = inputs.Drawn("samples", model, self.n)
        first = seed * self.n
        batches = drawn.batches(range(first, first + self.n), 125)
        found = evaluate.of_images(batches, self.network)
        return scores.compare(found, self.reference, self.network).value


class Lane:
    """One arm with one seed: its stages one after the other, in slices.

    Args:
        folder: holds a run directory for each stage, and what was measured.
        rate: in place of the arm's own learning rates; None keeps them.
    """

    def __init__(
        self,
        arm: Arm,
        seed: int,
        folder: Path,
        rate: float | None,
        reporter: Reporter,
        signals: launch.Signals,
    ) -> None:
        self.arm, self.seed, self.folder, self.rate = arm, seed, folder, rate
        self.reporter, self.signals = reporter, signals
        self.points = [Point(**line) for line in _lines(folder / "measured.jsonl")]
        self.stage = 0
        self.before = Point(0.0, 0.0, 0, 0.0, 0.0)  # what the finished stages have cost
        self.trainer: Trainer | None = None
        self.done = False
        self._total = sum(stage.steps for stage in arm.stages)

    def _begin(self) -> None:
        """Open this stage's training, at its newest checkpoint or at the last stage's weights."""
        config = self.arm.stages[self.stage].config.model_copy(deep=True)
        config.train.seed = self.seed
        if self.rate is not None:
            config.optim.lr = self.rate
        if self.stage:
            config.train.init_from = str(self._run(self.stage - 1) / "weights.safetensors")
        self.trainer = Trainer(
            config, self._run(self.stage), self.reporter, False, "msmdiff compare"
        )
        self._loop = self.trainer.steps(self.signals)

    def _run(self, stage: int) -> Path:
        return self.folder / f"stage-{stage + 1}"

    @property
    def now(self) -> Point:
        """What has been spent."""
        stage, trainer = self.arm.stages[self.stage], self.trainer
        images = trainer.images_seen if trainer else 0
        steps = images // stage.config.train.batch_size
        finished = sum(s.steps for s in self.arm.stages[: self.stage])
        return Point(
            passed=(finished + steps) / self._total,
            seconds=self.before.seconds + (trainer.seconds if trainer else 0.0),
            images=self.before.images + images,
            flops=self.before.flops + steps * stage.flops_per_step,
            value=math.nan,
        )

    def turn(self, seconds: float, number: int, judge: Judge, points: int) -> Turn:
        """Step for so many seconds, or to the end of a stage; measure where that is due."""
        if self.trainer is None:
            self._begin()
        assert self.trainer is not None
        start, stage = self.now, self.stage
        batch = self.arm.stages[stage].config.train.batch_size
        try:
            while self.now.seconds - start.seconds < seconds:
                next(self._loop)
                self._measure(judge, points)
        except StopIteration as ended:
            self._finish(ended.value, judge, points)
        end = self.now if self.stage == stage and not self.done else self.before
        return Turn(
            arm=self.arm.name,
            seed=self.seed,
            round=number,
            stage=stage,
            steps=(end.images - start.images) // batch,
            seconds=end.seconds - start.seconds,
            flops=end.flops - start.flops,
        )

    def _finish(self, summary: Summary, judge: Judge, points: int) -> None:
        """The end of a stage, or of the turn when a signal asked for it."""
        if summary.interrupted is not None:
            raise KeyboardInterrupt
        self._measure(judge, points)
        self.before = self.now
        assert self.trainer is not None
        self.trainer.close()
        self.trainer = None
        self.done = self.stage == len(self.arm.stages) - 1
        self.stage += not self.done

    def _measure(self, judge: Judge, points: int) -> None:
        """Draw and compare, where the next point of the budget was passed."""
        due = (len(self.points) + 1) / points
        now = self.now
        if now.passed + 1e-9 < due:
            return
        assert self.trainer is not None
        network, parts = self.trainer.sampled(), self.trainer.parts
        training = network.training
        model = previews.model_in_training(network.eval(), parts, self.trainer.config)
        now.value = judge.value(model, self.seed)
        network.train(training)
        self.points.append(now)
        with (self.folder / "measured.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(now)) + "\n")

    def stop(self) -> None:
        """Save what there is, after a signal."""
        if self.trainer is not None:
            for _ in self._loop:
                pass  # the loop sees the signal, saves and ends
            self.trainer.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a kill may have cut the last one."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


# ------------------------------------------------------------------ the comparison


@dataclass
class Outcome:
    """A finished comparison.

    Attributes:
        arms: name -> what its seeds came to.
        speed: arm -> images a second over those of the first arm, round by round.
        unsteady: the spread of the machine: how much slower the slowest tenth of turns was than
            the median one, after each arm's own pace is taken out.
    """

    spec: dict[str, Any]
    metric: str
    arms: dict[str, dict[str, Any]]
    speed: dict[str, dict[str, float]] = field(default_factory=dict)
    unsteady: float = 0.0


class Comparison:
    """All lanes of a spec, in one folder.

    Raises UsageError where the folder holds another comparison, or foreign files.
    """

    def __init__(self, spec: Spec, out: Path, reporter: Reporter) -> None:
        self.spec, self.out, self.reporter = spec, out, reporter
        self._claim()
        with files.writing(out):
            out.mkdir(parents=True, exist_ok=True)
        self.arms = self._planned()
        first = self.arms[0].stages[-1].config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.judge = Judge.of(spec.measure, first.data.image_size, device)
        self.turns = [Turn(**line) for line in _lines(out / "turns.jsonl")]

    def _claim(self) -> None:
        """The folder is new, empty, or of the same spec."""
        stored = self.out / "plan.json"
        if stored.is_file():
            with files.reading(stored, "the plan of a comparison"):
                there = json.loads(stored.read_text(encoding="utf-8"))["spec"]
            if there != self.spec.model_dump(mode="json"):
                raise UsageError(
                    f"{self.out} holds another comparison: give another --out, or the spec it was "
                    "started with"
                )
            return
        filled = self.out.is_dir() and any(self.out.iterdir())
        files.require_ours(self.out, ours=self.out.is_dir() and not filled)

    def _planned(self) -> list[Arm]:
        """The plan, as made when the comparison began."""
        path = self.out / "plan.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))["arms"]
            return [
                Arm(arm["name"], [_stage_of(stage, path) for stage in arm["stages"]])
                for arm in stored
            ]
        arms = plan(self.spec, self.reporter.note)
        content = [
            {
                "name": arm.name,
                "stages": [
                    {
                        "config": stage.config.as_dict(),
                        "seconds_per_step": stage.seconds_per_step,
                        "flops_per_step": stage.flops_per_step,
                    }
                    for stage in arm.stages
                ],
            }
            for arm in arms
        ]
        files.write_json(path, {"spec": self.spec.model_dump(mode="json"), "arms": content})
        return arms

    def run(self) -> Outcome:
        """Train everything in turns, or go on; then compare.

        Raises KeyboardInterrupt after a signal, when everything is saved.
        """
        with launch.Signals() as signals:
            first, *rest = self.spec.seeds
            rates: list[float | None] = list(self.spec.sweep) or [None]
            swept = {rate: self._rounds(first, [rate] * len(self.arms), signals) for rate in rates}
            best: list[float | None] = []
            for number in range(len(self.arms)):
                best.append(min(rates, key=lambda rate: swept[rate][number].points[-1].value))
            chosen = [swept[rate][number] for number, rate in enumerate(best)]
            lanes = [chosen, *(self._rounds(seed, best, signals) for seed in rest)]
        outcome = self._outcome(lanes, swept, best)
        files.write_json(self.out / "compare.json", asdict(outcome))
        return outcome

    def _rounds(
        self, seed: int, rates: Sequence[float | None], signals: launch.Signals
    ) -> list[Lane]:
        """All arms with one seed, in turns, to their ends."""
        lanes = []
        for arm, rate in zip(self.arms, rates, strict=True):
            name = f"seed-{seed}" + (f"-lr-{rate:g}" if rate is not None else "")
            folder = self.out / arm.name / name
            folder.mkdir(parents=True, exist_ok=True)
            lanes.append(Lane(arm, seed, folder, rate, self.reporter, signals))
        try:
            number = 0
            while not all(lane.done for lane in lanes):
                # Who begins a round changes, so that no arm is always the one after a pause.
                order = lanes[number % len(lanes) :] + lanes[: number % len(lanes)]
                for lane in order:
                    if not lane.done:
                        self._take(lane, number)
                number += 1
        except KeyboardInterrupt:
            for lane in lanes:
                lane.stop()
            raise
        return lanes

    def _take(self, lane: Lane, number: int) -> None:
        turn = lane.turn(self.spec.slice, number, self.judge, self.spec.measure.points)
        if turn.steps:
            self.turns.append(turn)
            with (self.out / "turns.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(turn)) + "\n")

    def _outcome(
        self,
        lanes: Sequence[Sequence[Lane]],
        swept: dict[float | None, list[Lane]],
        best: Sequence[float | None],
    ) -> Outcome:
        arms: dict[str, dict[str, Any]] = {}
        for number, arm in enumerate(self.arms):
            seeds = [of_seed[number] for of_seed in lanes]
            values = [lane.points[-1].value for lane in seeds]
            tried = {f"{r:g}": ls[number].points[-1].value for r, ls in swept.items() if r}
            arms[arm.name] = {
                "values": values,
                "mean": averages.fmean(values),
                "interval": interval(values),
                "seconds": averages.fmean(lane.points[-1].seconds for lane in seeds),
                "images": seeds[0].points[-1].images,
                "flops": seeds[0].points[-1].flops,
                "tuning": {"learning_rates": tried, "chosen": best[number]},
                "curves": {lane.seed: [asdict(point) for point in lane.points] for lane in seeds},
            }
        return Outcome(
            spec=self.spec.model_dump(mode="json"),
            metric=self.judge.network.title,
            arms=arms,
            speed=speed(self.turns, [arm.name for arm in self.arms]),
            unsteady=unsteadiness(self.turns),
        )


def _stage_of(stored: dict[str, Any], path: Path) -> Stage:
    layer = configuration.stored(stored["config"], str(path))
    return Stage(configuration.build(layer), stored["seconds_per_step"], stored["flops_per_step"])


# ------------------------------------------------------------------ figures


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * averages.stdev(values) / math.sqrt(len(values))
    mean = averages.fmean(values)
    return mean - half, mean + half


def speed(turns: Sequence[Turn], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Arm -> how many steps a second it takes for one of the first arm: median, lowest and highest
    tenth of the ratios within one round. Rounds in which both were at their first stage count.
    """
    paces: dict[tuple[int, int], dict[str, float]] = {}
    for turn in turns:
        if turn.stage == 0 and turn.seconds > 0:
            paces.setdefault((turn.seed, turn.round), {})[turn.arm] = turn.steps / turn.seconds
    found: dict[str, dict[str, float]] = {}
    for name in names[1:]:
        ratios = [p[name] / p[names[0]] for p in paces.values() if name in p and names[0] in p]
        if ratios:
            low, middle, high = _quantiles(ratios)
            found[name] = {"median": middle, "low": low, "high": high, "pairs": len(ratios)}
    return found


def unsteadiness(turns: Sequence[Turn]) -> float:
    """How much longer a step took in the slowest tenth of turns than in the median one, each beside
    the median of its own arm and stage: 0.1 is ten per cent.
    """
    kinds: dict[tuple[str, int], list[float]] = {}
    for turn in turns:
        kinds.setdefault((turn.arm, turn.stage), []).append(turn.seconds / turn.steps)
    relative = [t / averages.median(times) for times in kinds.values() for t in times]
    return _quantiles(relative)[2] - 1 if relative else 0.0


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    found = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    low, middle, high = found.tolist()
    return low, middle, high
