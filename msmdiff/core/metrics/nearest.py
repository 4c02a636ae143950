"""How near samples lie to the images that a network was trained on, beside images that it never
saw: memorising shows as samples that lie nearer.
"""

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import prdc
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.scores import Metric, Score, score
from msmdiff.core.metrics.statistics import Statistics
from msmdiff.core.registry import Options, register


class NearestOptions(Options):
    nearest_heldout: str | None = Field(
        None,
        description="Held-out images to compare with; null compares each training image with "
        "another one.",
    )


@register("metric", "nearest", NearestOptions)
class Nearest(Metric):
    """Distance of each sample to the nearest training image (the reference), beside that of
    held-out images, and how often the sample lies nearer: above 0.5 hints at memorising.
    """

    rows_of = "ab"

    def scores(self, a: Statistics, b: Statistics, features: Features) -> list[Score]:
        if a.rows is None or b.rows is None:
            return []
        spec = self.options["nearest_heldout"]
        others = None if spec is None else self._held_out(spec, b, features)
        found = nearness(a.rows, b.rows, others, features.device)
        beside = "other training" if spec is None else "held-out"
        titles = {
            "nearest": "nearest training image, median distance",
            "nearest_heldout": f"the same of {beside} images",
            "copied": f"samples nearer than {beside} images",
        }
        return [score(n, titles[n], v, sets=(a, b), features=features) for n, v in found.items()]

    def _held_out(self, spec: str, b: Statistics, features: Features) -> Tensor:
        """The features of the held-out images, cropped as the reference. Raises UsageError."""
        from msmdiff.core.metrics import evaluate, inputs

        if type(features) is Features:
            raise UsageError(
                f"metric.nearest_heldout {spec}: its images have to be measured, but of the other "
                "sides only statistics are given: name the images of one"
            )
        crop = b.settings.get("crop", "").removeprefix("adm ")
        opened = inputs.open_input(spec, crop=int(crop) if crop else None)
        rows = evaluate.of_input(opened, features, keep_rows=True).rows
        if rows is None:
            raise UsageError(f"metric.nearest_heldout {spec} holds no images: name some")
        return rows


def nearness(
    samples: Tensor,
    training: Tensor,
    held_out: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """How near samples [M, D] lie to training images [N, D], beside held-out ones [K, D]; without
    those, beside each training image's nearest other one.

    `nearest` and `nearest_heldout` are median Euclidean distances. `copied` is the share of pairs
    of a sample and a held-out image in which the sample lies nearer, ties counted half: 0.5 where
    samples are as new as held-out images, 1 where each is nearer than any of those (the test of
    Meehan et al. 2020, without their cells).
    """
    # Smaller numbers lose less in |a|^2 + |b|^2 - 2 a.b.
    mean = training.double().mean(0).to(training.dtype)
    centred = training - mean
    ours = prdc.nearest(samples - mean, centred, 1, device)[0][:, 0].sqrt()
    if held_out is None:
        theirs = prdc.nearest(centred, None, 1, device)[0][:, 0].sqrt()
    else:
        theirs = prdc.nearest(held_out - mean, centred, 1, device)[0][:, 0].sqrt()
    ordered = theirs.sort().values
    # Of the held-out images: how many lie farther, and how many as far.
    nearer = len(ordered) - torch.searchsorted(ordered, ours, right=True)
    equal = len(ordered) - torch.searchsorted(ordered, ours) - nearer
    return {
        "nearest": float(ours.median()),
        "nearest_heldout": float(theirs.median()),
        "copied": float((nearer + equal / 2).double().mean() / len(ordered)),
    }
