"""What the arms are measured by: a distance of their samples, the loss on held-out images, and how
near the samples lie to training images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.compare.spec import Measure
from msmdiff.core.config import Config
from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import evaluate, features, inputs, scores
from msmdiff.core.metrics.nearest import nearness
from msmdiff.core.training import previews, validation
from msmdiff.core.training.trainer import Trainer

HELDOUT = "held-out loss"
COPIED = "share nearer to training images than held-out ones"


@dataclass
class Judge:
    """Measures trainings.

    Attributes:
        measure: how.
        network, reference: of the samples' distance; None where no samples are drawn.
        known, unknown: features of the training images and of held-out ones; None unless samples
            are looked up among them.
    """

    measure: Measure
    network: Any = None
    reference: Any = None
    known: Tensor | None = None
    unknown: Tensor | None = None

    @classmethod
    def of(cls, measure: Measure, config: Config, device: torch.device) -> "Judge":
        """Measures the references once. `config` is of one of the trainings, which share the data.

        Raises UsageError for what cannot be had.
        """
        if not measure.n:
            return cls(measure)
        given = Path(measure.weights) if measure.weights else None
        kind, weights = features.named(measure.features, given)
        options = registry.find("features", kind, "measure.features").options()
        network = features.build(kind, weights, device, **options.model_dump())
        side = config.data.image_size
        alike = validation.opened_alike(config, measure.reference)
        opened = inputs.open_input(measure.reference, crop=side, data=alike)
        judge = cls(measure, network, opened.stored or evaluate.of_input(opened, network))
        if measure.nearest:
            spec = validation.source_of(config)
            if spec is None:
                raise UsageError(
                    "measure.nearest needs images that are not trained on: set eval.heldout"
                )
            beside = validation.opened_alike(config, spec)
            judge.known, judge.unknown = (
                evaluate.of_input(
                    inputs.open_input(data.source, crop=side, data=data), network, keep_rows=True
                ).rows
                for data in (config.data, beside)
            )
        return judge

    @property
    def titles(self) -> dict[str, str]:
        """What is measured -> what people call it."""
        distance = {} if self.network is None else {"distance": self.network.title}
        copied = {} if self.known is None else {"copied": COPIED}
        return {**distance, "heldout": HELDOUT, **copied}

    def __call__(self, trainer: Trainer, seed: int, last: bool) -> dict[str, float]:
        """The `heldout` loss of a training as it is now, the `distance` of its samples, and how
        far they are `copied`: those of them that are measured.
        """
        network, parts, config = trainer.sampled(), trainer.parts, trainer.config
        training = network.training
        network.eval()
        found: dict[str, float] = {}
        if self.network is not None and (last or self.measure.samples == "every"):
            found |= self._of_samples(previews.model_in_training(network, parts, config), seed)
        asked = config.model_copy(deep=True)
        asked.eval.heldout_every = 1
        source, device = trainer.dataset.source, trainer.device
        loss = validation.Validation.of(asked, parts, source, device, lambda text: None)
        if loss is not None:
            found["heldout"] = loss(network)["val_loss"]
        network.train(training)
        return found

    def _of_samples(self, model: Any, seed: int) -> dict[str, float]:
        """Of samples of seeds of this arm's seed alone."""
        n = self.measure.n
        batches = inputs.Drawn("samples", model, n).batches(range(seed * n, seed * n + n), 125)
        drawn = evaluate.of_images(batches, self.network, keep_rows=True)
        found = {"distance": scores.compare(drawn, self.reference, self.network).value}
        if self.known is not None and drawn.rows is not None:
            near = nearness(drawn.rows, self.known, self.unknown, self.network.device)
            found["copied"] = near["copied"]
        return found
