"""What the samples of an arm are measured by."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msmdiff.core import registry
from msmdiff.core.compare.spec import Measure
from msmdiff.core.metrics import evaluate, features, inputs, scores


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
