"""One arm with one seed: a chain of trainings that runs in slices."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msmdiff.core.compare.figures import Turn
from msmdiff.core.compare.judge import Judge
from msmdiff.core.compare.planning import Arm
from msmdiff.core.diffusion import masking
from msmdiff.core.training import launch
from msmdiff.core.training.run import Summary
from msmdiff.core.training.trainer import Trainer


@dataclass
class Point:
    """A measurement along an arm's budget; what it has cost until then.

    Attributes:
        passed: share of the arm's steps.
        distance, heldout, copied: what the judge said; None where it does not measure that.
    """

    passed: float
    seconds: float
    images: int
    flops: float
    distance: float | None = None
    heldout: float | None = None
    copied: float | None = None


class Silent:
    """A reporter that says nothing."""

    def note(self, text: str) -> None:
        pass

    def progress(self, images_seen: int, total: int, metrics: dict[str, Any]) -> None:
        pass

    def activity(self, what: str, done: int, total: int) -> None:
        pass


class Lane:
    """One arm with one seed: its stages one after the other, in slices.

    Its trainings say nothing of themselves: their logs are in their run directories.

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
        signals: launch.Signals,
    ) -> None:
        self.arm, self.seed, self.folder, self.rate = arm, seed, folder, rate
        self.signals = signals
        self.points = [Point(**line) for line in lines_of(folder / "measured.jsonl")]
        self.stage = 0
        self.before = Point(0.0, 0.0, 0, 0.0)  # what the finished stages have cost
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
        self.trainer = Trainer(config, self._run(self.stage), Silent(), False, "msmdiff compare")
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
        )

    def turn(self, seconds: float, number: int, judge: Judge) -> Turn:
        """Step for so many seconds, or to the end of a stage; measure where that is due."""
        if self.trainer is None:
            self._begin()
        assert self.trainer is not None
        start, stage, piece = self.now, self.stage, self._piece()
        batch = self.arm.stages[stage].config.train.batch_size
        try:
            while self.now.seconds - start.seconds < seconds:
                next(self._loop)
                piece = piece if piece == self._piece() else -1
                self._measure(judge)
        except StopIteration as ended:
            self._finish(ended.value, judge)
        if self.trainer is not None:
            self.trainer.settle()  # the next arm's turn does not wait for this one's last step
        end = self.now if self.stage == stage and not self.done else self.before
        return Turn(
            arm=self.arm.name,
            seed=self.seed,
            round=number,
            piece=piece,
            steps=(end.images - start.images) // batch,
            seconds=end.seconds - start.seconds,
            flops=end.flops - start.flops,
        )

    def _piece(self) -> int:
        """Which kind of step comes next."""
        assert self.trainer is not None
        stage = self.arm.stages[self.stage]
        passed = self.trainer.images_seen / (stage.steps * stage.config.train.batch_size)
        kinds = self.trainer.parts.objective.stages
        earlier = sum(
            len(masking.over_training(s.config.mask)) for s in self.arm.stages[: self.stage]
        )
        return earlier + sum(kind.start <= passed for kind in kinds) - 1

    def _finish(self, summary: Summary, judge: Judge) -> None:
        """The end of a stage, or of the turn when a signal asked for it."""
        if summary.interrupted is not None:
            raise KeyboardInterrupt
        self._measure(judge)
        self.before = self.now
        assert self.trainer is not None
        self.trainer.close()
        self.trainer = None
        self.done = self.stage == len(self.arm.stages) - 1
        self.stage += not self.done

    def _measure(self, judge: Judge) -> None:
        """Judge, where the next point of the budget was passed."""
        points = judge.measure.points
        due = (len(self.points) + 1) / points
        if self.now.passed + 1e-9 < due:
            return
        assert self.trainer is not None
        self.trainer.settle()  # all of its seconds count
        now = self.now
        found = judge(self.trainer, self.seed, last=len(self.points) + 1 == points)
        for name, value in found.items():
            setattr(now, name, value)
        self.points.append(now)
        with (self.folder / "measured.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(now)) + "\n")

    def stop(self) -> None:
        """Save what there is, after a signal."""
        if self.trainer is not None:
            for _ in self._loop:
                pass  # the loop sees the signal, saves and ends
            self.trainer.close()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a kill may have cut the last one."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
