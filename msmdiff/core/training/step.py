"""One optimiser step: what the trainer runs and the bench times."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from msmdiff.core.backbones.routes import checkpoint_blocks, compile_blocks
from msmdiff.core.build import Parts
from msmdiff.core.config import Config
from msmdiff.core.data.loader import Batch, flip
from msmdiff.core.diffusion.alignment import Alignment
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.seeding import key, stream
from msmdiff.core.training import launch, optim, sharding
from msmdiff.core.training.ema import Averages


@dataclass
class Taken:
    """What a step was like.

    Attributes:
        terms: mean loss terms, on the device.
        grad_norm: before clipping, on the device; 0 where it was not finite.
        seconds, waited: the whole step, and of it the time waiting for data.
    """

    terms: dict[str, Tensor]
    grad_norm: float | Tensor
    seconds: float
    waited: float


@dataclass
class Unchecked:
    """A step whose gradients nobody has looked at yet.

    Attributes:
        norm: of its gradients, on its way to the host.
        arrived: when it will be there; None where it is.
        terms, images_seen: what a message says.
    """

    norm: Tensor
    arrived: torch.cuda.Event | None
    terms: dict[str, Tensor]
    images_seen: int

    @classmethod
    def of(cls, norm: Tensor, terms: dict[str, Tensor], images_seen: int) -> "Unchecked":
        """Send a norm to the host without waiting for it."""
        arrived = torch.cuda.Event() if norm.is_cuda else None
        copy = norm.detach().to("cpu", non_blocking=True)
        if arrived is not None:
            arrived.record()
        return cls(copy, arrived, terms, images_seen)

    def read(self) -> float:
        """The norm, waiting for nothing that was queued after it."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.norm.item()


class Step:
    """Everything that a step touches, prepared once; calling it takes one.

    Args:
        config: resolved.
        parts: built from it, with the weights to start from.
        accelerator: devices, precision and processes.
        note: told of steps that are left out.
        last_good: the checkpoint that a message may name.

    Raises UsageError where the batch does not divide among the processes, and what an alignment
    raises that cannot start.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        accelerator: Any,
        note: Callable[[str], None] = lambda text: None,
        last_good: Callable[[], Path | None] = lambda: None,
    ) -> None:
        self.config, self.parts, self.accelerator = config, parts, accelerator
        self.note, self.last_good = note, last_good
        self.device = accelerator.device
        self.micro, self.accumulate = launch.shares(config.train, accelerator.num_processes)
        self.skipped = 0
        self.passed = 0.0  # the share of the training
        parts.process.to(self.device)
        if parts.objective.history is not None:
            parts.objective.history.gather = accelerator.gather
        backbone = parts.backbone
        checkpoint_blocks(backbone, int(config.train.gradient_checkpointing))
        self.averages = Averages(backbone.to(self.device), config.ema)
        if config.train.compile:
            compile_blocks(backbone)
        self.alignment = self._aligned()
        beside = [] if self.alignment is None else self.alignment.parameters()
        optimizer = optim.build(config.optim, optim.Parameters.of(backbone, beside))
        copies = self.averages.copies()
        self.model, self.optimizer = sharding.prepare(accelerator, backbone, optimizer, copies)
        if self.alignment is not None:
            self.alignment.prepare(accelerator.prepare)
        parts.objective.alignment = self.alignment
        self.defers = self._can_defer(optimizer)
        self._unchecked: Unchecked | None = None

    def _aligned(self) -> Alignment | None:
        """The alignment, ready for training. Its numbers are drawn apart from the network's, so
        that the network starts as without it.

        Raises UsageError where what it trains would have to be sharded.
        """
        torch.manual_seed(key(self.config.train.seed, "alignment"))
        made = self.parts.alignment(self.config)
        if made is None:
            return None
        if self.accelerator.is_fsdp2 and (made.averaged or made.projector is not None):
            raise UsageError(
                f"objective.alignment {self.config.objective.alignment} is not supported with "
                "sharding (FSDP): use layersync, or training without it"
            )
        made.start(self.device, self.averages.networks, self.accelerator.autocast)
        return made

    def _trained(self) -> list[torch.nn.Parameter]:
        """Everything that the optimiser moves."""
        beside = [] if self.alignment is None else self.alignment.parameters()
        return [*self.model.parameters(), *beside]

    def _can_defer(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the device itself can leave out an update, so that nobody has to wait for its
        norm: torch's fused optimisers do.
        """
        fused = all(group.get("fused") for group in optimizer.param_groups)
        simple = self.accelerator.scaler is None and not self.accelerator.is_fsdp2
        stops = self.config.train.on_nonfinite == "stop"
        return self.device.type == "cuda" and fused and simple and stops

    def __call__(self, batches: Iterator[Batch], images_seen: int) -> Taken:
        """Take the step that follows `images_seen` images, over the next batch_size of them.

        Raises MsmdiffError for a loss or a gradient that is not finite, before the update; on a GPU
        at the step after it, or when `settle` is called: the update is left out there all the same.
        """
        train, started, waited = self.config.train, time.perf_counter(), 0.0
        rate = optim.learning_rate(self.config.optim, images_seen, train.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Nothing draws from the global generators; this keeps it so even for a layer that one day
        # would.
        torch.manual_seed(key(train.seed, "global", self.accelerator.process_index, images_seen))
        self.passed = min(images_seen / (train.steps * train.batch_size), 1.0)
        terms: dict[str, Tensor] = {}
        for i in range(self.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            if i < self.accumulate - 1:
                with self.accelerator.no_sync(self.model):
                    part = self._backward(batch)
            else:
                part = self._backward(batch)
            terms = {name: terms.get(name, 0.0) + value for name, value in part.items()}
        norm = self._clipped_norm(terms, images_seen)
        if norm is not None:
            self.optimizer.step()
            self.averages.update()
        self.optimizer.zero_grad(set_to_none=True)
        if norm is None or (isinstance(norm, float) and not math.isfinite(norm)):
            norm = 0.0
        return Taken(terms, norm, time.perf_counter() - started, waited)

    def settle(self) -> None:
        """Look at the last step's gradients, if that is still to be done. Raises MsmdiffError as
        calling does.
        """
        last, self._unchecked = self._unchecked, None
        if last is not None and not math.isfinite(norm := last.read()):
            self._stop(norm, last.terms, last.images_seen)

    def _backward(self, batch: Batch) -> dict[str, Tensor]:
        """One micro-batch, forth and back; its share of the step's loss terms, detached."""
        seed, hflip = self.config.train.seed, self.config.data.hflip

        def draw(purpose: str, device: torch.device | str = self.device) -> torch.Generator:
            return stream(device, seed, purpose, batch.position)

        images = batch.images.to(self.device, non_blocking=True)
        y = None
        if batch.y is not None:
            y = batch.y.to(self.device, non_blocking=True)
        flipped = None
        if hflip:
            flipped = torch.rand(len(images), generator=draw("flip"), device=self.device) < hflip
        x0 = self.parts.codec.encode(flip(images, flipped), draw("codec"))
        terms = self.parts.objective(self.model, x0, y, draw, self.passed)
        self.accelerator.backward(terms["loss"] / self.accumulate)
        return {name: value.detach() / self.accumulate for name, value in terms.items()}

    def _clipped_norm(self, terms: dict[str, Tensor], images_seen: int) -> float | Tensor | None:
        """Clip the gradients and return their norm; None where this step must not be taken."""
        limit = self.config.optim.clip_grad_norm or math.inf
        clipped = self.accelerator.clip_grad_norm_(self._trained(), limit)
        if not self.defers:
            return self._checked(float(sharding.gathered(clipped)), terms, images_seen)
        self.settle()  # the step before: the host is never more than one step ahead
        self._unchecked = Unchecked.of(clipped, terms, images_seen)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer.found_inf = (~clipped.isfinite()).float()
        return clipped

    def _checked(self, norm: float, terms: dict[str, Tensor], images_seen: int) -> float | None:
        if math.isfinite(norm):
            return norm
        self.skipped += 1
        loss_is_finite = all(bool(torch.isfinite(value)) for value in terms.values())
        scaler = self.accelerator.scaler
        scaled = scaler is not None and scaler.get_scale() > 1
        if scaled and not launch.agree(self.accelerator, not loss_is_finite):
            # fp16: the loss scale was too large; the scaler leaves this step out and halves it.
            return norm
        if self.config.train.on_nonfinite == "skip":
            if scaler is not None:
                # Leaves the step out too, and has to be told of every gradient it unscaled.
                self.optimizer.step()
            self.note(
                f"image {images_seen:,}: gradient norm {norm}, step skipped ({self.skipped} so far)"
            )
            return None
        self._stop(norm, terms, images_seen)

    def _stop(self, norm: float, terms: dict[str, Tensor], images_seen: int) -> NoReturn:
        shown = ", ".join(f"{name} {value.item():.6g}" for name, value in terms.items())
        raise MsmdiffError(
            f"stopped before the update at image {images_seen:,}: {shown}, gradient norm {norm}; "
            f"the last good checkpoint is {self.last_good() or 'none yet'}. A lower optim.lr or "
            "train.precision fp32 may help; train.on_nonfinite=skip goes on and counts"
        )
