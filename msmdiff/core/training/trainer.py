"""The one training loop. `pretrain`, `finetune` and `train` differ in their configuration only."""

import functools
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch

from msmdiff.core import backbones
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import Config
from msmdiff.core.data import checking
from msmdiff.core.data.loader import Batch, TrainingImages, batches
from msmdiff.core.data.order import Chunks
from msmdiff.core.seeding import key
from msmdiff.core.training import (
    checkpoint,
    cost,
    launch,
    origins,
    preparing,
    previews,
    results,
    sharding,
    telling,
    trackers,
)
from msmdiff.core.training.evaluation import Evaluator, Judged
from msmdiff.core.training.meter import Meter
from msmdiff.core.training.run import Reporter, Run, Summary, show
from msmdiff.core.training.standing import Reached, Standing
from msmdiff.core.training.step import Step
from msmdiff.core.training.validation import Validation


def train(
    config: Config,
    run_path: Path,
    reporter: Reporter,
    *,
    allow_partial: bool = False,
    allow_change: bool = False,
    command: str = "",
) -> Summary:
    """Train until `train.steps` or `train.max_seconds`; continues the run in `run_path` when there
    is one.

    Args:
        config: need not be resolved.
        run_path: the run's directory.
        reporter: for messages and progress.
        allow_partial: start from weights (`train.init_from`) even if few of them fit.
        allow_change: go on with another rate and the like, see `changes.KNOWINGLY`.
        command: what the user typed, for the run's record.

    Raises UsageError for a configuration that cannot work or differs from the run's, and
    MsmdiffError when training has to stop; whatever was checkpointed by then is intact.
    """
    with launch.Signals() as signals:
        trainer = None
        with signals.breaking_off():
            trainer = Trainer(
                config=config,
                run_path=run_path,
                reporter=reporter,
                allow_partial=allow_partial,
                allow_change=allow_change,
                command=command,
            )
        if trainer is None:  # while data were checked or the network was built
            return Summary(run_path, 0, 0, 0.0, writes=launch.first(), interrupted=signals.received)
        try:
            return trainer.fit(signals)
        finally:
            trainer.close()


class Trainer:
    """Everything a run needs, built once; `fit` is the loop."""

    def __init__(
        self,
        config: Config,
        run_path: Path,
        reporter: Reporter,
        allow_partial: bool,
        command: str,
        allow_change: bool = False,
    ) -> None:
        self.reporter, self._began = reporter, time.monotonic()
        self._allow_change = allow_change
        self.main = launch.first()
        source = checking.opened(config.data, self._note)
        begun = Run(run_path, writes=False).begun()
        config = preparing.resolved(config, begun, source.num_classes)
        source.check(config)
        self.accelerator = launch.accelerator(config, run_path)
        self.device = self.accelerator.device
        self.run = Run(run_path, writes=self.main)
        try:
            # Hours for a million images: after all that may be refused at once, and by one process.
            source = checking.checked(source, config.data, self._note, launch.from_first)
            self.dataset = TrainingImages(source, config.data, config.train.seed)
            self._prepare(config, allow_partial, command)
        except BaseException:
            self.close()
            raise

    def _prepare(self, config: Config, allow_partial: bool, command: str) -> None:
        config = preparing.measured(config, self.dataset, self._note)
        if self.run.lost_config():
            self._note(telling.lost_config(self.run.path))
        for line in self.run.admit(config, self._allow_change):
            self._note(line)
        self.config = config
        launch.shares(config.train, self.accelerator.num_processes)

        # The network: fresh, from other weights, or (below) from this run's newest checkpoint.
        torch.manual_seed(key(config.train.seed, "init"))
        self.parts = road.build(config, self.device)
        for line in road.notes(config):
            self._note(f"note: {line}")
        preparing.tell_condition(self.parts.objective.condition, self.dataset.source, self.device)
        found = self._clear_checkpoints()
        if config.train.init_from and not found:
            preparing.start_from_weights(
                config, self.parts.backbone, self.dataset.source, allow_partial, self._note
            )

        # What a step touches, and where the run stands.
        self.step = Step(
            config,
            self.parts,
            self.accelerator,
            note=self._note,
            last_good=lambda: checkpoint.newest(self.run.path),
        )
        self.standing = Standing(
            config=config,
            run=self.run,
            source=self.dataset.source,
            step=self.step,
            main=self.main,
            note=self._note,
        )
        if found:
            self.standing.restore(found)
        else:
            self.standing.origins = origins.of(config, self.dataset.source)

        self._earlier = self.standing.waited
        self._watch(config)
        self.run.start(config, command, self.images_seen)
        if config.train.trackers:
            self.accelerator.init_trackers("msmdiff", configuration.plain(config))

    def _watch(self, config: Config) -> None:
        """What looks at the training: its cost, its log, held-out images, its samples."""
        self.cost = cost.measure(config)
        mean = functools.partial(self.accelerator.reduce, reduction="mean")
        self.meter = Meter(self.cost, self.device, mean)
        self.validation = Validation.of(
            config, self.parts, self.dataset.source, self.device, self._note
        )
        self.evaluator = None
        if config.eval.every:
            judged = Judged(
                config=config,
                parts=self.parts,
                run=self.run,
                source=self.dataset.source,
                device=self.device,
            )
            self.evaluator = Evaluator(judged, self._note, self.reporter.activity)

    def _clear_checkpoints(self) -> Path | None:
        """Remove torn checkpoints; returns the newest whole one."""
        if self.main:
            for torn in checkpoint.clear_torn(self.run.path):
                self._note(f"passed over and removed {torn}: it was not whole")
        self.accelerator.wait_for_everyone()
        return checkpoint.newest(self.run.path)

    # ------------------------------------------------------------------ the loop

    def fit(self, signals: launch.Signals | None = None) -> Summary:
        """Train to the end, or until a signal asks to stop."""
        if signals is None:
            with launch.Signals() as own:
                return self.fit(own)
        steps = self.steps(signals)
        while True:
            try:
                next(steps)
            except StopIteration as ended:
                return ended.value

    def steps(self, signals: launch.Signals) -> Generator[None, None, Summary]:
        """The loop, which pauses after every step; what it returns is the `Summary`. Several of
        these may take turns in one process.
        """
        train = self.config.train
        total = train.steps * train.batch_size
        self._introduce()
        if self.images_seen >= total:
            self._note(telling.finished(self.run.path, self.config))
        pins = self.device.type == "cuda"
        stream_of_batches = batches(self.dataset, self._chunks(), pins, self._note)
        reached = self._reached()
        while True:
            step = self.images_seen // train.batch_size
            told = self._agree(signals.received is not None)
            late = self._is_late() if train.max_seconds is None else self._agree(self._is_late())
            done = self.images_seen >= total or told or late
            if self.images_seen:
                self._record(reached, step, done, told, total)
            if told:
                break  # whoever stops us may not wait for pictures and distances
            self._show(reached, step, done, signals)
            self._evaluate(reached, step, done, signals)
            if self._alone and signals.received is not None:
                continue
            if done:
                break
            self._take_step(stream_of_batches)
            yield
        if self.main and not told:
            results.of_run(self.run, self.config)
        # One of several processes may have been told, the others only through it.
        signal = signals.received or (SIGTERM if told else None)
        return Summary(
            run=self.run.path,
            images_seen=self.images_seen,
            steps=step,
            seconds=self.seconds,
            writes=self.main,
            interrupted=signal,
            remark=telling.unmoved_average(self.config.ema, step),
        )

    def _is_late(self) -> bool:
        """Whether the user has waited as long as `train.max_seconds` says, in all starts. A first
        step is taken in any case: without a checkpoint the next start would wait as long again.
        """
        self.standing.waited = self._earlier + time.monotonic() - self._began
        limit = self.config.train.max_seconds
        return limit is not None and self.images_seen > 0 and self.standing.waited >= limit

    def _reached(self) -> Reached:
        """Where a start stands. A kill may have come between a checkpoint and what follows it; the
        first process can tell.
        """
        saved = self.images_seen or -1
        pictured = self.main and previews.drawn(self._stem, self.config, self.images_seen)
        evaluator = self.evaluator if self.main else None
        measured = evaluator is not None and evaluator.measured(self.images_seen)
        return Reached(
            saved=saved,
            pictured=saved if self._agree(pictured) else -1,
            evaluated=saved if self._agree(measured) else -1,
        )

    def _record(self, reached: Reached, step: int, done: bool, told: bool, total: int) -> None:
        """Log and save, where that is due; whoever stops us does not wait for a held-out loss."""
        train = self.config.train
        validates = not told and self._validates(done, step)
        logs = done or validates or step % train.log_every == 0
        due = done or step % train.checkpoint_every == 0
        keeps = self.standing.owes_snapshot(total) and reached.saved != self.images_seen
        if logs or due or keeps:
            self.settle()
        if logs:
            self._log(total, validates)
        if keeps:  # before the checkpoint: who goes on from that has it
            self.standing.keep_snapshot()
        if due and reached.saved != self.images_seen:
            self.standing.save()
            reached.saved = self.images_seen

    def _show(self, reached: Reached, step: int, done: bool, signals: launch.Signals) -> None:
        """Draw pictures, where that is due; a signal breaks them off."""
        every = self.config.train.preview_every
        due = every and (done or step % every == 0)
        if not due or reached.pictured == self.images_seen:
            return
        with self._breaking_off(signals):
            self._preview()
        reached.pictured = self.images_seen

    def _evaluate(self, reached: Reached, step: int, done: bool, signals: launch.Signals) -> None:
        """Measure samples, where that is due; a signal breaks it off."""
        every = self.config.eval.every
        due = self.images_seen and (done or (every and step % every == 0))
        if not (self.evaluator and due) or reached.evaluated == self.images_seen:
            return
        if self._alone and signals.received is not None:
            return
        with self._breaking_off(signals):
            saved = reached.saved == self.images_seen
            score = self.evaluator(self.sampled(), self.images_seen, saved)
            self.accelerator.log(score, step=self.images_seen)
            if self.main:
                results.of_run(self.run, self.config)
        reached.evaluated = self.images_seen

    @property
    def images_seen(self) -> int:
        """The images that the training's steps took."""
        return self.standing.images_seen

    @property
    def seconds(self) -> float:
        """The time spent in steps."""
        return self.standing.seconds

    @property
    def _alone(self) -> bool:
        return self.accelerator.num_processes == 1

    def _breaking_off(self, signals: launch.Signals) -> AbstractContextManager[None]:
        # Of several processes the others would wait at a barrier.
        return signals.breaking_off() if self._alone else nullcontext()

    def settle(self) -> None:
        """Wait for what the last step left to the device: it is part of that step's seconds."""
        started = time.perf_counter()
        self.step.settle()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.standing.seconds += time.perf_counter() - started

    def _take_step(self, stream_of_batches: Iterator[Batch]) -> None:
        taken = self.step(stream_of_batches, self.images_seen)
        batch_size = self.config.train.batch_size
        self.standing.images_seen += batch_size
        self.standing.seconds += taken.seconds
        self.meter.add(
            taken.terms,
            taken.grad_norm,
            images=batch_size,
            seconds=taken.seconds,
            waited=taken.waited,
        )

    # ------------------------------------------------------------------ what happens between steps

    def _log(self, total: int, validates: bool = False) -> None:
        metrics = self.meter.read()
        if not metrics:
            return
        line = {
            "images": self.images_seen,
            "step": self.images_seen // self.config.train.batch_size,
            "mask_ratio": 0.0,
            **metrics,
            "lr": self.step.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.step.skipped,
            "seconds": self.seconds,
        }
        if validates and self.validation is not None:
            network = self._averaged(None)  # every process has to ask for it where it is sharded
            line |= self.validation(network) if self.main else {}
        self.run.log(line)
        self.accelerator.log(line, step=self.images_seen)  # to the trackers there are
        if self.main:
            left = telling.seconds_left(self.config, line, self.standing.waited)
            self.reporter.progress(self.images_seen, total, line | {"seconds_left": left})
        if validates:
            if self.main and self.images_seen < total:  # else the end draws it
                results.of_run(self.run, self.config)
            self.accelerator.wait_for_everyone()

    def _validates(self, done: bool, step: int) -> bool:
        """Whether this step has a held-out loss."""
        return self.validation is not None and (done or step % self.validation.every == 0)

    def sampled(self) -> Any:
        """The network that samples are drawn from: the average of `sample.ema`, else the first."""
        return self._averaged(self.config.sample.ema)

    def _averaged(self, wanted: float | None) -> Any:
        """An average by its decay, else the first one, else the trained network; a copy where
        sharded.
        """
        averages = self.step.averages.networks
        first = next(iter(averages.values()), self.accelerator.unwrap_model(self.step.model))
        network = averages.get(f"{wanted:g}", first) if wanted is not None else first
        if not self.accelerator.is_fsdp2:
            return network
        with self.device:
            alone = backbones.build(self.config.model, self.parts.codec.shape)
        alone.load_state_dict(sharding.gathered(network.state_dict()))
        return alone

    def _preview(self) -> None:
        network = self.sampled()
        if self.main:
            model = previews.model_in_training(network, self.parts, self.config)
            planned = None
            if previews.draws_samples(self.config, self.images_seen):
                planned = previews.plan(model.config, self.cost, first=not self.images_seen)
            tell = self.reporter.activity
            previews.draw(model, self.parts, self.dataset, self._stem, planned=planned, tell=tell)
            trackers.pictures(self.accelerator, self._stem, self.images_seen)
        self.accelerator.wait_for_everyone()

    @property
    def _stem(self) -> Path:
        """What this step's pictures are called, up to what they show."""
        return self.run.path / "previews" / f"img-{self.images_seen:09d}"

    def _introduce(self) -> None:
        rows = telling.introduction(
            config=self.config,
            parts=self.parts,
            cost=self.cost,
            source=self.dataset.source,
            where=f"{self.device.type} x {self.accelerator.num_processes}",
            run=self.run.path,
        )
        if self.main:
            show(self.reporter, f"training {self.run.path}", rows)

    def _chunks(self) -> Chunks:
        accelerator, batch_size = self.accelerator, self.config.train.batch_size
        return Chunks(
            images_seen=self.images_seen,
            batch_size=batch_size,
            micro_batch_size=self.step.micro,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )

    def _agree(self, stop: bool) -> bool:
        return launch.agree(self.accelerator, stop)

    def _note(self, text: str) -> None:
        if self.main:
            self.reporter.note(text)

    def close(self) -> None:
        """Finish the trackers and let another process into the run's directory."""
        if self.accelerator.trackers:
            self.accelerator.end_training()
        self.run.close()
