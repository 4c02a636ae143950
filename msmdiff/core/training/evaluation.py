"""Distances along a run: while it trains, or of its checkpoints afterwards; the curve, and which
was best.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msmdiff.core import files, registry
from msmdiff.core.build import Parts
from msmdiff.core.condition import Text
from msmdiff.core.config import Config
from msmdiff.core.data import sources
from msmdiff.core.data.source import Source
from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import evaluate, features, scores, statistics
from msmdiff.core.metrics.inputs import Drawn, Images, Stored, draws, open_input
from msmdiff.core.training import checkpoint, previews, validation
from msmdiff.core.training.run import Run


@dataclass
class Judged:
    """A training whose samples are measured."""

    config: Config
    parts: Parts
    run: Run
    source: Source
    device: torch.device


class Evaluator:
    """The Fréchet distance of `eval.n` samples, seeds from 0 on, to `eval.reference`, else to the
    training data.

    Raises UsageError or MsmdiffError, before any training, for features or a reference that cannot
    be had.
    """

    def __init__(
        self,
        judged: Judged,
        note: Callable[[str], None],
        tell: previews.Tell = lambda what, done, total: None,
    ) -> None:
        self.config, self.parts, self.run = judged.config, judged.parts, judged.run
        self._note, self._tell = note, tell
        options, side = self.config.eval, self.config.data.image_size
        if isinstance(self.parts.objective.condition, Text):
            raise UsageError(
                "eval.every: measuring while training does not draw from text; set it to 0"
            )
        entry = registry.find("features", options.features, "eval.features")
        weights = Path(options.weights) if options.weights else None
        self.features = features.build(
            options.features, weights, judged.device, **entry.takes(options)
        )
        self._kept = None
        wanted = options.reference or validation.source_of(self.config)
        if wanted is None:
            self._kept = self.run.path / "eval-reference.npz"
            self._reference: Images = Stored(judged.source, side)
        else:
            alike = validation.opened_alike(self.config, wanted)
            self._reference = open_input(wanted, crop=side, data=alike)
        if self._kept and self._kept.is_file():  # measured before this run was resumed
            found = statistics.load(self._kept)
            if found and found.settings == self.features.settings() | self._reference.settings:
                self._reference.stored = found
        evaluate.check(self._drawn(self.parts.backbone), self._reference, self.features)
        sample = self.config.sample.model_dump()
        other = {"every", "heldout", "heldout_n", "heldout_every"}
        how = {"sample": sample, **options.model_dump(exclude=other)}
        if options.reference is None and wanted is not None:
            how["reference"] = wanted
        if sum(getattr(self.parts.objective.condition, "counts", ())):
            how["classes"] = "data"  # as `Drawn` deals them
        self._how = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:12]

    def _drawn(self, network: Any) -> Drawn:
        model = previews.model_in_training(network, self.parts, self.config)
        return Drawn("samples", model, self.config.eval.n)

    def measured(self, images_seen: int) -> bool:
        """Whether the run's log has this step's distance, measured as now: settings may change
        between two starts.

        Then the curve and `best.json` are written again: a kill may have come before them.
        """
        if not any(m["images"] == images_seen for m in self._alike()):
            return False
        self._keep_best()
        return True

    def _alike(self) -> list[dict[str, Any]]:
        return [m for m in self.run.metrics() if m.get("measured_as") == self._how]

    def _keep_best(self) -> str:
        """Draw the curve of those measured alike, write the best to `best.json`, and tell it."""
        name = self.features.metric
        points = [(m["images"], m[name], m["saved"]) for m in self._alike()]
        return record(self.run.path, "best", self.features.title, points)

    def __call__(self, network: Any, images_seen: int, saved: bool) -> dict[str, float]:
        """Measure, log, draw the curve, and note the best of those measured alike; returns the
        distance by its name.

        `saved`: whether this step's checkpoint is.
        """
        if self._reference.stored is None:
            self._note(
                f"measuring {len(self._reference):,} reference images ({self.features.name})"
            )
            looking = functools.partial(self._tell, "measuring the reference")
            self._reference.stored = evaluate.of_input(
                self._reference, self.features, progress=looking
            )
            if self._kept and self.run.writes:
                statistics.save(self._kept, self._reference.stored)
        training = network.training
        drawing = functools.partial(self._tell, "drawing and measuring samples")
        made = self._drawn(network.eval())
        drawn = evaluate.of_input(made, self.features, 64, progress=drawing)
        network.train(training)
        score, step = (
            scores.compare(drawn, self._reference.stored, self.features),
            self.config.train.batch_size,
        )
        line = {
            "images": images_seen,
            "step": images_seen // step,
            score.name: score.value,
            "eval_n": drawn.count,
        }
        self.run.log({**line, "saved": saved, "measured_as": self._how})
        if self.run.writes:
            best = self._keep_best()
            others = sum("eval_n" in m for m in self.run.metrics()) - len(self._alike())
            if others:
                best += f" ({others} earlier, with other settings of eval or sample, do not count)"
            self._note(
                f"image {images_seen:,}: {score.title} {score.value:.4f} of {drawn.count:,} "
                f"samples; {best}"
            )
        return {score.name: score.value}


def record(run: Path, stem: str, title: str, points: Sequence[tuple[int, float, bool]]) -> str:
    """Note the lowest of (images seen, value, whether saved) in `STEM.json`, and draw them all in
    `previews/`.

    The checkpoint that `best.json` names stays when older ones go.
    """
    images, value, saved = min(points, key=lambda point: point[1])
    name = f"checkpoints/img-{images:09d}" if saved else None
    best = {"metric": title, "value": value, "images": images, "checkpoint": name}
    files.write_json(run / f"{stem}.json", best)
    previews.curve(run / "previews" / f"{stem}.png", title, [point[:2] for point in points])
    return f"best so far {value:.4f} at image {images:,}"


def open_run(
    run: Path, reference: str | None, crop: int | None
) -> tuple[Path, dict[int, Path], str, int | None]:
    """A run's directory, the weights of every whole checkpoint by images seen, and a reference with
    its crop.

    The weights are the first average's, or else the model's; the reference, unless given, the
    training data.
    """
    # A folder of a run's name does not hide it.
    path = run if (run / "config.yaml").is_file() else Path("runs") / run
    config = Run(path, writes=False).stored_config()
    if config is None:
        raise UsageError(f"--run {run}: no run with a config.yaml, here or under runs/")
    stem = f"ema-{config.ema.decays[0]}" if config.ema.decays else "model"
    found = {int(p.name[4:]): p / f"{stem}.safetensors" for p in checkpoint.complete(path)}
    if reference is None:
        reference, crop = config.data.source, crop or config.data.image_size
        if draws(reference) or not sources.is_data(reference):
            raise UsageError(
                f"--run {run}: the data it was trained on, {reference}, is not there: name "
                "the other side"
            )
    return path, found, reference, crop
