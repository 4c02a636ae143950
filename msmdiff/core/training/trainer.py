"""The one training loop. `pretrain`, `finetune` and `train` differ in their configuration only."""

import math
import os
import time
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from torch import Tensor

from msmdiff.core import backbones, weights
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import Config
from msmdiff.core.data.latents import Latents
from msmdiff.core.data.loader import Batch, TrainingImages, batches, flip, open_training
from msmdiff.core.data.order import Chunks
from msmdiff.core.diffusion import codecs
from msmdiff.core.diffusion.codecs import DwtCodec
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.seeding import key, stream
from msmdiff.core.training import checkpoint, cost, launch, optim, previews, sharding, warmstart
from msmdiff.core.training.ema import Averages
from msmdiff.core.training.evaluation import Evaluator
from msmdiff.core.training.meter import Meter
from msmdiff.core.training.run import Reporter, Run, Summary


def train(
    config: Config,
    run_path: Path,
    reporter: Reporter,
    *,
    allow_partial: bool = False,
    command: str = "",
) -> Summary:
    """Train until `train.steps` or `train.max_seconds`; continues the run in `run_path` when there
    is one.

    Args:
        config: need not be resolved.
        run_path: the run's directory.
        reporter: for messages and progress.
        allow_partial: start from weights (`train.init_from`) even if few of them fit.
        command: what the user typed, for the run's record.

    Raises UsageError for a configuration that cannot work or differs from the run's, and
    MsmdiffError when training has to stop; whatever was checkpointed by then is intact.
    """
    trainer = Trainer(config, run_path, reporter, allow_partial, command)
    try:
        return trainer.fit()
    finally:
        trainer.close()


class Trainer:
    """Everything a run needs, built once; `fit` is the loop."""

    def __init__(
        self, config: Config, run_path: Path, reporter: Reporter, allow_partial: bool, command: str
    ) -> None:
        self.reporter = reporter
        self.main = int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK") == "0"
        source = open_training(config.data, self._note)
        config = config.model_copy(deep=True)
        begun = Run(run_path, writes=False).begun()
        if begun and config.optim.decay_steps is None:  # more steps later do not change the past
            config.optim.decay_steps = begun.optim.decay_steps
        config = road.resolve(config, source.num_classes)
        source.check(config)
        config.train.precision = launch.choose_precision(
            config, "cuda" if torch.cuda.is_available() else "cpu"
        )
        self.dataset, self.listing = (
            TrainingImages(source, config.data, config.train.seed),
            source.identity(),
        )
        self.accelerator = launch.accelerator(config, run_path)
        self.device = self.accelerator.device
        self.run = Run(run_path, writes=self.main)
        try:
            self._prepare(config, allow_partial, command)
        except BaseException:
            self.close()
            raise

    def _prepare(self, config: Config, allow_partial: bool, command: str) -> None:
        config = self._with_statistics(config)
        self.run.admit(config)
        self.config = config
        train, world = config.train, self.accelerator.num_processes
        self.micro = train.micro_batch_size or max(1, train.batch_size // world)
        if train.batch_size % (self.micro * world):
            raise UsageError(
                f"train.batch_size {train.batch_size} does not divide by {world} processes x "
                "micro-batches of "
                f"{self.micro}"
            )

        torch.manual_seed(key(train.seed, "init"))
        self.parts = road.build(config)
        self.parts.process.to(self.device)
        if self.parts.objective.history is not None:
            self.parts.objective.history.gather = self.accelerator.gather
        source = self.dataset.source
        if isinstance(source, Latents) and source.captioned and source.null_context is not None:
            self.parts.objective.null = source.null_context.to(self.device)
        backbone = self.parts.backbone
        if self.main:
            for torn in checkpoint.clear_torn(self.run.path):
                self._note(f"passed over and removed {torn}: it was not whole")
        self.accelerator.wait_for_everyone()
        found = checkpoint.newest(self.run.path)
        if train.init_from and not found:
            # Only a published file asks for this: shapes do not tell how many heads a network has.
            told = {k: v for k, v in config.model.model_dump().items() if k == "num_heads"}
            stored = weights.read(weights.locate(train.init_from), told)
            report = warmstart.start_from(backbone, stored, allow_partial)
            for line in report.lines():
                self._note(line)
        backbone.gradient_checkpointing = train.gradient_checkpointing
        self.averages = Averages(backbone.to(self.device), config.ema)
        if train.compile:
            backbone.compile()  # in place: parameter names stay as they are
        trained = (backbone, optim.build(config.optim, backbone.parameters()))
        self.model, self.optimizer = sharding.prepare(
            self.accelerator, *trained, self.averages.networks.values()
        )
        self.images_seen, self.seconds, self.skipped = 0, 0.0, 0
        if found:
            self._restore(found)
        self.cost = cost.measure(config)
        self.meter = Meter(
            self.cost, self.device, lambda terms: self.accelerator.reduce(terms, "mean")
        )
        judged = (config, self.parts, self.run, self.dataset.source, self.device, self._note)
        self.evaluator = Evaluator(*judged) if config.eval.every else None
        self.run.start(config, command, self.images_seen)
        if train.trackers:
            self.accelerator.init_trackers("msmdiff", configuration.plain(config))

    # ------------------------------------------------------------------ the loop

    def fit(self) -> Summary:
        train = self.config.train
        total = train.steps * train.batch_size
        self._introduce(total)
        stream_of_batches = batches(self.dataset, self._chunks(), self.device.type == "cuda")
        saved_at = self.images_seen or -1
        # A kill may have come between a checkpoint and what follows it; the first process can tell.
        previewed_at = (
            saved_at if self._agree(self.main and previews.samples_at(self._stem).is_file()) else -1
        )
        measured = (
            self.main and self.evaluator is not None and self.evaluator.measured(self.images_seen)
        )
        evaluated_at = saved_at if self._agree(measured) else -1
        with launch.Signals() as signals:
            while True:
                step = self.images_seen // train.batch_size
                told = self._agree(signals.received is not None)
                late = train.max_seconds is not None and self._agree(
                    self.seconds >= train.max_seconds
                )
                done = self.images_seen >= total or told or late
                if self.images_seen and (done or step % train.log_every == 0):
                    self._log(total)
                if (
                    self.images_seen
                    and saved_at != self.images_seen
                    and (done or step % train.checkpoint_every == 0)
                ):
                    self._save()
                    saved_at = self.images_seen
                if told and self.images_seen < total:
                    break  # whoever stops us may not wait for pictures and distances
                pictured = train.preview_every and (done or step % train.preview_every == 0)
                if pictured and previewed_at != self.images_seen:
                    self._preview()
                    previewed_at = self.images_seen
                due = done or (self.config.eval.every and step % self.config.eval.every == 0)
                if self.evaluator and due and self.images_seen and evaluated_at != self.images_seen:
                    self.evaluator(
                        self._sampled(),
                        self.images_seen,
                        done or step % train.checkpoint_every == 0,
                    )
                    evaluated_at = self.images_seen
                if done:
                    break
                self._step(stream_of_batches)
        signal = signals.received or (
            SIGTERM if told else None
        )  # of all processes, one may have been told
        return Summary(self.run.path, self.images_seen, step, self.seconds, self.main, signal)

    def _step(self, stream_of_batches: Any) -> None:
        """One optimiser step over the next batch_size images."""
        train, started, waited = self.config.train, time.perf_counter(), 0.0
        rate = optim.learning_rate(self.config.optim, self.images_seen, train.batch_size)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Nothing draws from the global generators; this keeps it so even for a layer that one day
        # would.
        torch.manual_seed(
            key(train.seed, "global", self.accelerator.process_index, self.images_seen)
        )
        accumulate = train.batch_size // (self.micro * self.accelerator.num_processes)
        terms: dict[str, Tensor] = {}
        for i in range(accumulate):
            asked = time.perf_counter()
            batch: Batch = next(stream_of_batches)
            waited += time.perf_counter() - asked
            if i < accumulate - 1:
                with self.accelerator.no_sync(self.model):
                    part = self._accumulate(batch, accumulate)
            else:
                part = self._accumulate(batch, accumulate)
            terms = {name: terms.get(name, 0.0) + value for name, value in part.items()}
        grad_norm = self._checked_norm(terms)
        if grad_norm is not None:
            self.optimizer.step()
            self.averages.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.images_seen += train.batch_size
        spent = time.perf_counter() - started
        self.seconds += spent
        finite = grad_norm is not None and math.isfinite(grad_norm)
        self.meter.add(
            terms,
            grad_norm if grad_norm is not None and finite else 0.0,
            train.batch_size,
            spent,
            waited,
        )

    def _accumulate(self, batch: Batch, accumulate: int) -> dict[str, Tensor]:
        """Backward through one micro-batch; returns its share of the step's loss terms, detached."""

        def draw(purpose: str, device: torch.device | str = self.device) -> torch.Generator:
            return stream(device, self.config.train.seed, purpose, batch.position)

        images = batch.images.to(self.device, non_blocking=True)
        labels = (
            batch.labels.to(self.device, non_blocking=True) if batch.labels is not None else None
        )
        flipped = None
        if self.config.data.hflip:
            flipped = (
                torch.rand(len(images), generator=draw("flip"), device=self.device)
                < self.config.data.hflip
            )
        x0 = self.parts.codec.encode(flip(images, flipped), draw("codec"))
        terms = self.parts.objective(self.model, x0, labels, draw)
        self.accelerator.backward(terms["loss"] / accumulate)
        return {name: value.detach() / accumulate for name, value in terms.items()}

    def _checked_norm(self, terms: dict[str, Tensor]) -> float | None:
        """Clip the gradients and return their norm; None where this step must not be taken."""
        limit = self.config.optim.clip_grad_norm
        norm = float(
            sharding.whole(
                self.accelerator.clip_grad_norm_(self.model.parameters(), limit or math.inf)
            )
        )
        if math.isfinite(norm):
            return norm
        loss_is_finite = all(bool(torch.isfinite(value)) for value in terms.values())
        self.skipped += 1
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() > 1 and not self._agree(not loss_is_finite):
            return norm  # fp16: the loss scale was too large; the scaler leaves this step out and halves it
        if self.config.train.on_nonfinite == "skip":
            if scaler is not None:
                self.optimizer.step()  # leaves the step out too, and has to be told of every gradient it unscaled
            self._note(
                f"image {self.images_seen:,}: gradient norm {norm}, step skipped "
                f"({self.skipped} so far)"
            )
            return None
        shown = ", ".join(f"{name} {value.item():.6g}" for name, value in terms.items())
        good = checkpoint.newest(self.run.path)
        raise MsmdiffError(
            f"stopped before the update at image {self.images_seen:,}: {shown}, gradient "
            f"norm {norm}; "
            f"the last good checkpoint is {good or 'none yet'}. A lower optim.lr or "
            "train.precision fp32 may help; "
            "train.on_nonfinite=skip goes on and counts"
        )

    # ------------------------------------------------------------------ what happens between steps

    def _log(self, total: int) -> None:
        metrics = self.meter.read()
        if not metrics:
            return
        line = {
            "images": self.images_seen,
            "step": self.images_seen // self.config.train.batch_size,
            "mask_ratio": 0.0,
            **metrics,
            "lr": self.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.skipped,
            "seconds": self.seconds,
        }
        self.run.log(line)
        if self.config.train.trackers:
            self.accelerator.log(line, step=self.images_seen)
        if self.main:
            self.reporter.progress(self.images_seen, total, line)

    def _sampled(self) -> Any:
        """The network that samples are drawn from, a copy where sharded.

        It is the average of `sample.ema`, else the first one, else the trained network.
        """
        averages, wanted = self.averages.networks, self.config.sample.ema
        first = next(iter(averages.values()), self.accelerator.unwrap_model(self.model))
        network = averages.get(f"{wanted:g}", first) if wanted is not None else first
        if not self.accelerator.is_fsdp2:
            return network
        with self.device:
            alone = backbones.build(self.config.model, self.parts.codec.shape)
        alone.load_state_dict(sharding.whole(network.state_dict()))
        return alone

    def _preview(self) -> None:
        network = self._sampled()
        if self.main:
            previews.draw(network, self.parts, self.config, self.dataset, self.device, self._stem)
        self.accelerator.wait_for_everyone()

    @property
    def _stem(self) -> Path:
        """What this step's pictures are called, up to what they show."""
        return self.run.path / "previews" / f"img-{self.images_seen:09d}"

    def _save(self) -> None:
        scaler, history = self.accelerator.scaler, self.parts.objective.history
        state = {
            "images_seen": self.images_seen,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages.counters(),
            "times": history.state_dict() if history is not None else None,
            "data": len(self.dataset.source),
            "listing": self.listing,
            "processes": self.accelerator.num_processes,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        networks = {"model": self.accelerator.unwrap_model(self.model).state_dict()}
        networks |= {
            f"ema-{decay}": net.state_dict() for decay, net in self.averages.networks.items()
        }
        state, networks = sharding.whole((state, networks), keep=self.main)
        if self.main:
            keep = self.config.train.keep_checkpoints
            checkpoint.save(self.run.path, self.images_seen, state, networks, self.config, keep)
        self.accelerator.wait_for_everyone()

    def _restore(self, path: Path) -> None:
        state, networks = checkpoint.load(path)
        sharding.load(self.accelerator.unwrap_model(self.model), networks["model"])
        averaged = {stem.removeprefix("ema-"): t for stem, t in networks.items() if stem != "model"}
        self.averages.load(state["averages"], averaged)
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        if self.parts.objective.history is not None:
            self.parts.objective.history.load_state_dict(state["times"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.images_seen, self.seconds, self.skipped = (
            state["images_seen"],
            state["seconds"],
            state["skipped"],
        )
        listing = state.get("listing", self.listing)
        if (state["data"], listing) != (count := len(self.dataset.source), self.listing):
            others = " others, or of other classes" if state["data"] == count else ""
            raise UsageError(
                f"{self.run.path} was trained on {state['data']:,} images, "
                f"{self.config.data.source} now has "
                f"{count:,}{others}: restore the data, or finetune --ckpt from it in another --run"
            )
        if self.main:
            stem = next((f"ema-{decay}" for decay in self.averages.networks), "model")
            checkpoint.publish(path, self.run.path, stem)
        self._note(f"resuming {self.run.path} at image {self.images_seen:,}")
        if (
            state["processes"] != self.accelerator.num_processes
            and not self.config.train.micro_batch_size
        ):
            self._note(
                f"{state['processes']} processes before, {self.accelerator.num_processes} now: "
                "other random draws"
            )

    def _with_statistics(self, config: Config) -> Config:
        """Measure what the codec needs to know of the data, once; a resumed run keeps what it
        measured.
        """
        codec = codecs.build(config.codec, config.data.image_size)
        if not isinstance(codec, DwtCodec) or (config.codec.mean and config.codec.std):
            return config
        stored = self.run.begun()
        if stored and stored.codec.model_copy(update={"mean": None, "std": None}) == config.codec:
            config.codec = stored.codec
        else:
            config.codec.mean, config.codec.std = codec.measure(self.dataset.sample(2048))
            shown = ", ".join(f"{v:.3g}" for v in config.codec.std)
            self._note(f"measured the deviation of {codec.bands} sub-bands: {shown}")
        return config

    def _introduce(self, total: int) -> None:
        mask, cost_, limit = self.parts.mask, self.cost, self.config.train.max_seconds
        goal = (
            f"{total:,} images to see"
            if limit is None
            else f"{limit:,.0f} seconds of steps, or {total:,} images"
        )
        self._note(
            f"{self.run.path}: {cost_.parameters / 1e6:.2f} M parameters, "
            f"{len(self.dataset.source):,} images, "
            f"batch {self.config.train.batch_size}, {self.config.train.precision} on "
            f"{self.device.type} x "
            f"{self.accelerator.num_processes}, {goal}"
        )
        if self.config.objective.name == "mdt":
            low, spread = self.config.mask.ratio, self.config.mask.spread or 0.0
            self._note(
                f"a second pass hides {low:.0%}"
                + (f" to {low + spread:.0%}" if spread else "")
                + " of the tokens"
            )
        elif self.config.mask.ratio or mask.kept < mask.tokens:
            self._note(
                f"the network sees {mask.kept} of {mask.tokens} tokens "
                f"({mask.effective_ratio:.1%} hidden), "
                f"{cost_.masked_flops / cost_.forward_flops:.1%} of the full pass"
            )

    def _chunks(self) -> Chunks:
        accelerator, batch_size = self.accelerator, self.config.train.batch_size
        return Chunks(
            self.images_seen,
            batch_size,
            self.micro,
            accelerator.process_index,
            accelerator.num_processes,
        )

    def _agree(self, stop: bool) -> bool:
        """Whether any process wants to stop; all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return stop
        flag = torch.tensor([float(stop)], device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _note(self, text: str) -> None:
        if self.main:
            self.reporter.note(text)

    def close(self) -> None:
        """Finish the trackers and let another process into the run's directory."""
        if self.accelerator.trackers:
            self.accelerator.end_training()
        self.run.close()
