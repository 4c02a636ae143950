"""Several trainings under one budget: arms that take turns in short slices, so that whatever else
the machine does hits all of them alike.

A comparison is planned first: a budget of seconds or FLOPs becomes a number of steps for every
stage of every arm, of paces that are timed in alternation. From then on it is deterministic, and a
comparison that was killed goes on to the same bits.
"""

import json
import os
import statistics as averages
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msmdiff.core import config as configuration
from msmdiff.core import files, machine, weights
from msmdiff.core.compare import pictures
from msmdiff.core.compare.figures import Turn, speed, summed_up, unsteadiness
from msmdiff.core.compare.judge import Judge
from msmdiff.core.compare.lane import Lane, Point, lines_of
from msmdiff.core.compare.planning import Arm, Stage, plan
from msmdiff.core.compare.spec import Spec
from msmdiff.core.data.images import grid
from msmdiff.core.errors import UsageError
from msmdiff.core.training import launch
from msmdiff.core.training.run import Reporter

WRITTEN = ("plan.json", "turns.jsonl", "compare.json", "curves.png", "samples.png")
"""Files of a comparison, beside a folder for each arm."""


@dataclass
class Outcome:
    """A finished comparison.

    Attributes:
        metrics: what was measured -> what people call it; `by` is the one that decides.
        seeds: those that are done; a comparison goes on until it has all of its spec's.
        arms: name -> what its seeds came to.
        device: what it ran on.
        speed: arm -> images a second over those of the first arm, round by round.
        unsteady: the spread of the machine: how much slower the slowest tenth of turns was than
            the median one, after each arm's own pace is taken out.
    """

    spec: dict[str, Any]
    metrics: dict[str, str]
    by: str
    seeds: list[int]
    arms: dict[str, dict[str, Any]]
    device: str = ""
    speed: dict[str, dict[str, float]] = field(default_factory=dict)
    unsteady: float = 0.0

    @property
    def metric(self) -> str:
        """What people call what decides."""
        return self.metrics[self.by]


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
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.judge = Judge.of(spec.measure, first, self.device)
        self.turns = [Turn(**line) for line in lines_of(out / "turns.jsonl")]

    def _claim(self) -> None:
        """The folder is of the same spec, or nothing in it is in the way."""
        stored = self.out / "plan.json"
        if stored.is_file():
            with files.reading(stored, "the plan of a comparison"):
                there = json.loads(stored.read_text(encoding="utf-8"))["spec"]
            if not _continues(there, self.spec.model_dump(mode="json")):
                raise UsageError(
                    f"{self.out} holds another comparison: give another --out, or the spec it was "
                    "started with"
                )
            return
        # The folder may hold other things, but nothing that would be written.
        for name in (*self.spec.arms, *WRITTEN):
            if os.path.lexists(self.out / name):
                raise UsageError(
                    f"{self.out / name} is there already, and no comparison wrote it: give another "
                    "--out"
                )

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
        """Train everything in turns, or go on; then compare. `compare.json` is written after every
        seed.

        Raises KeyboardInterrupt after a signal, when everything is saved.
        """
        with launch.Signals() as signals:
            first, *rest = self.spec.seeds
            rates: list[float | None] = list(self.spec.sweep) or [None]
            swept = {rate: self._rounds(first, [rate] * len(self.arms), signals) for rate in rates}
            best = [self._best(swept, number) for number in range(len(self.arms))]
            lanes = [[swept[rate][number] for number, rate in enumerate(best)]]
            outcome = self._written(lanes, swept, best)
            for seed in rest:
                lanes.append(self._rounds(seed, best, signals))
                outcome = self._written(lanes, swept, best)
        return outcome

    def _best(self, swept: dict[float | None, list[Lane]], number: int) -> float | None:
        """The learning rate with which an arm came out lowest."""
        return min(swept, key=lambda rate: self._decides(swept[rate][number].points[-1]))

    def _decides(self, point: Point) -> float:
        value: float | None = getattr(point, self.spec.measure.by)
        assert value is not None
        return value

    def folder(self, arm: Arm, seed: int, rate: float | None) -> Path:
        """Where an arm's training with one seed, and one learning rate of a sweep, lies."""
        name = f"seed-{seed}" + (f"-lr-{rate:g}" if rate is not None else "")
        return self.out / arm.name / name

    def _rounds(
        self, seed: int, rates: Sequence[float | None], signals: launch.Signals
    ) -> list[Lane]:
        """All arms with one seed, in turns, to their ends."""
        lanes = []
        for arm, rate in zip(self.arms, rates, strict=True):
            folder = self.folder(arm, seed, rate)
            folder.mkdir(parents=True, exist_ok=True)
            lanes.append(Lane(arm, seed, folder, rate, signals))
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
        known = len(lane.points)
        turn = lane.turn(self.spec.slice, number, self.judge)
        if turn.steps:
            self.turns.append(turn)
            with (self.out / "turns.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(turn)) + "\n")
        for point in lane.points[known:]:
            found = {name: getattr(point, name) for name in self.judge.titles}
            shown = [f"{self.judge.titles[n]} {v:.4g}" for n, v in found.items() if v is not None]
            self.reporter.note(
                f"{lane.arm.name}, seed {lane.seed}, {point.passed:.0%} in {point.seconds:.0f} s: "
                f"{', '.join(shown)}"
            )

    def _written(
        self,
        lanes: Sequence[Sequence[Lane]],
        swept: dict[float | None, list[Lane]],
        best: Sequence[float | None],
    ) -> Outcome:
        """What the finished seeds came to, also in `compare.json`."""
        arms: dict[str, dict[str, Any]] = {}
        for number, arm in enumerate(self.arms):
            seeds = [of_seed[number] for of_seed in lanes]
            ends = [lane.points[-1] for lane in seeds]
            tried = {f"{r:g}": self._decides(ls[number].points[-1]) for r, ls in swept.items() if r}
            arms[arm.name] = {
                **summed_up([self._decides(end) for end in ends]),
                "measured": {
                    name: summed_up([getattr(end, name) for end in ends])
                    for name in self.judge.titles
                    if getattr(ends[0], name) is not None
                },
                "seconds": averages.fmean(end.seconds for end in ends),
                "images": ends[0].images,
                "flops": ends[0].flops,
                "masking": arm.masking(),
                "tuning": {"learning_rates": tried, "chosen": best[number]},
                "curves": {lane.seed: [asdict(point) for point in lane.points] for lane in seeds},
            }
        outcome = Outcome(
            spec=self.spec.model_dump(mode="json"),
            metrics=self.judge.titles,
            by=self.spec.measure.by,
            seeds=[of_seed[0].seed for of_seed in lanes],
            arms=arms,
            device=machine.name_of(self.device),
            speed=speed(self.turns, [arm.name for arm in self.arms]),
            unsteady=unsteadiness(self.turns),
        )
        files.write_json(self.out / "compare.json", asdict(outcome))
        return outcome

    def draw(self, outcome: Outcome) -> None:
        """`curves.png` and `samples.png`: the first seed's, the same noise for every arm."""
        pictures.draw(outcome.arms, outcome.metrics, self.out / "curves.png")
        grids = {}
        for arm in self.arms:
            rate = outcome.arms[arm.name]["tuning"]["chosen"]
            folder = self.folder(arm, self.spec.seeds[0], rate)
            file = folder / f"stage-{len(arm.stages)}" / "weights.safetensors"
            images = weights.load(file, self.device).draw(range(64)).permute(0, 2, 3, 1).numpy()
            grids[arm.name] = np.asarray(grid(images, 8))
        pictures.side_by_side(grids, self.out / "samples.png")


def _stage_of(stored: dict[str, Any], path: Path) -> Stage:
    layer = configuration.stored(stored["config"], str(path))
    return Stage(configuration.build(layer), stored["seconds_per_step"], stored["flops_per_step"])


def _continues(stored: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a spec is the stored one, but for seeds after the first."""

    def others(spec: dict[str, Any]) -> dict[str, Any]:
        return {**spec, "seeds": spec["seeds"][:1]}

    return others(stored) == others(asked)
