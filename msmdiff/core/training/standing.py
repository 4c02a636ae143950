"""Where a training stands: everything that a checkpoint holds, out of the trainer's parts and back
into them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msmdiff.core.config import Config
from msmdiff.core.data.source import Source
from msmdiff.core.training import checkpoint, origins, posthoc, sharding
from msmdiff.core.training.run import Run
from msmdiff.core.training.step import Step


@dataclass
class Reached:
    """At how many images seen the last of each was; -1 where there was none."""

    saved: int
    pictured: int
    evaluated: int


@dataclass
class Standing:
    """A training that is saved and goes on.

    Attributes:
        config, run, source, step: the training's parts.
        main: whether this process is the one that writes.
        note: told what a resumed run should know.
        images_seen: the images that its steps took.
        seconds: the time spent in steps.
        waited: the time that the user has waited for it, of all starts together.
        origins: what it was made from, as `origins.of` says.
    """

    config: Config
    run: Run
    source: Source
    step: Step
    main: bool
    note: Callable[[str], None]
    images_seen: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    origins: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write a checkpoint; every process has to ask for it."""
        accelerator, history = self.step.accelerator, self.step.parts.objective.history
        scaler = accelerator.scaler
        state = {
            "images_seen": self.images_seen,
            "seconds": self.seconds,
            "waited": self.waited,
            "skipped": self.step.skipped,
            "optimizer": self.step.optimizer.state_dict(),
            "averages": self.step.averages.counters(),
            "times": history.state_dict() if history is not None else None,
            "data": len(self.source),
            "processes": accelerator.num_processes,
            "scaler": scaler.state_dict() if scaler is not None else None,
            **self.origins,
        }
        if self.step.alignment is not None:
            state["alignment"] = self.step.alignment.state_dict()
        networks = {"model": accelerator.unwrap_model(self.step.model).state_dict()}
        networks |= self.step.averages.state_dicts()
        state, networks = sharding.gathered((state, networks), wanted=self.main)
        if self.main:
            checkpoint.save(
                run=self.run.path,
                images_seen=self.images_seen,
                state=state,
                networks=networks,
                config=self.config,
                retain=self.config.train.keep_checkpoints,
                class_names=self.source.class_names,
                class_counts=self.source.class_counts,
            )
        accelerator.wait_for_everyone()

    def owes_snapshot(self, total: int) -> bool:
        """Whether a snapshot is due: after every so many steps, and at the end, `total` images."""
        every = self.config.ema.snapshots_every
        step = self.images_seen // self.config.train.batch_size
        return bool(every and step) and (step % every == 0 or self.images_seen >= total)

    def keep_snapshot(self) -> None:
        """Keep the averages of snapshots; every process has to ask for it."""
        averages = self.step.averages
        tensors = {width: net.state_dict() for width, net in averages.of_snapshots.items()}
        tensors = sharding.gathered(tensors, wanted=self.main)
        if self.main:
            posthoc.keep(
                run=self.run.path,
                images_seen=self.images_seen,
                updates=averages.updates,
                networks=tensors,
                config=self.config,
                classes=(self.source.class_names, self.source.class_counts),
            )
        self.step.accelerator.wait_for_everyone()

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises UsageError for other data or weights to start from."""
        state, networks = checkpoint.load(path)
        begun = self.run.begun()
        assert begun is not None
        self.origins = origins.known_again(self.run.path, begun, self.config, self.source, state)
        self._load(state, networks)
        self.images_seen, self.seconds = state["images_seen"], state["seconds"]
        self.waited = state.get("waited", self.seconds)  # which older checkpoints do not know
        if self.main:
            stem = next((f"ema-{decay}" for decay in self.step.averages.networks), "model")
            keep = self.config.train.keep_checkpoints
            checkpoint.finish(self.run.path, stem, keep, self.images_seen)
        self.note(f"resuming {self.run.path} at image {self.images_seen:,}")
        now = self.step.accelerator.num_processes
        if state["processes"] != now and not self.config.train.micro_batch_size:
            self.note(f"{state['processes']} processes before, {now} now: other random draws")

    def _load(self, state: dict[str, Any], networks: dict[str, Any]) -> None:
        """The numbers of a checkpoint into network, averages and optimiser."""
        step = self.step
        accelerator, history = step.accelerator, step.parts.objective.history
        sharding.load(accelerator.unwrap_model(step.model), networks["model"])
        step.averages.load(state["averages"], networks)
        sharding.load_optimizer(step.optimizer, state["optimizer"])
        if history is not None:
            history.load_state_dict(state["times"])
        if accelerator.scaler is not None and state["scaler"] is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if step.alignment is not None:
            step.alignment.load_state_dict(state["alignment"])
        step.skipped = state["skipped"]
