"""What the arms are measured by: a distance of their samples, and the loss on held-out images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msmdiff.core import registry
from msmdiff.core.compare.spec import Measure
from msmdiff.core.metrics import evaluate, features, inputs, scores
from msmdiff.core.training import previews
from msmdiff.core.training.trainer import Trainer
from msmdiff.core.training.validation import Validation

HELDOUT = "held-out loss"


@dataclass
class Judge:
    """Measures trainings.

    Attributes:
        measure: how.
        network, reference: of the samples' distance; None where no samples are drawn.
    """

    measure: Measure
    network: Any
    reference: Any

    @classmethod
    def of(cls, measure: Measure, size: int, device: torch.device) -> "Judge":
        """Measures the reference once. Raises UsageError for what cannot be had."""
        if not measure.n:
            return cls(measure, None, None)
        given = Path(measure.weights) if measure.weights else None
        kind, weights = features.named(measure.features, given)
        options = registry.find("features", kind, "measure.features").options()
        network = features.build(kind, weights, device, **options.model_dump())
        opened = inputs.open_input(measure.reference, crop=size)
        stored = opened.stored or evaluate.of_input(opened, network)
        return cls(measure, network, stored)

    @property
    def titles(self) -> dict[str, str]:
        """What is measured -> what people call it."""
        distance = {} if self.network is None else {"distance": self.network.title}
        return {**distance, "heldout": HELDOUT}

    def __call__(self, trainer: Trainer, seed: int, last: bool) -> dict[str, float | None]:
        """The `distance` and the `heldout` loss of a training as it is now; None for what is not
        measured.
        """
        network, parts, config = trainer.sampled(), trainer.parts, trainer.config
        training = network.training
        network.eval()
        distance = None
        if self.network is not None and (last or self.measure.samples == "every"):
            distance = self._distance(previews.model_in_training(network, parts, config), seed)
        asked = config.model_copy(deep=True)
        asked.eval.heldout_every = 1
        source, device = trainer.dataset.source, trainer.device
        loss = Validation.of(asked, parts, source, device, lambda text: None)
        heldout = None if loss is None else loss(network)["val_loss"]
        network.train(training)
        return {"distance": distance, "heldout": heldout}

    def _distance(self, model: Any, seed: int) -> float:
        """Of samples of seeds of this arm's seed alone."""
        n = self.measure.n
        batches = inputs.Drawn("samples", model, n).batches(range(seed * n, seed * n + n), 125)
        found = evaluate.of_images(batches, self.network)
        return scores.compare(found, self.reference, self.network).value
