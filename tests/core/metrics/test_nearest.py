"""Nearness to training images, against sets whose answer is known."""

import pytest
import torch

from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import evaluate
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.nearest import Nearest, nearness
from msmdiff.core.metrics.statistics import Gaussian, Statistics


def rows(n, seed, width=5):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_copies_lie_nearer_than_every_held_out_image():
    training, held_out = rows(200, 0), rows(100, 1)
    found = nearness(training[:50] + 1e-2, training, held_out)
    assert found["copied"] == 1
    assert found["nearest"] == pytest.approx(1e-2 * 5**0.5, rel=0.05)
    assert found["nearest_heldout"] > 0.3


def test_fresh_images_are_as_near_as_held_out_ones():
    found = nearness(rows(1000, 2), rows(500, 3), rows(1000, 4))
    assert found["copied"] == pytest.approx(0.5, abs=0.05)
    assert found["nearest"] == pytest.approx(found["nearest_heldout"], rel=0.05)


def test_far_ones_are_never_nearer_and_ties_count_half():
    training = torch.zeros(3, 2)
    assert nearness(torch.full((4, 2), 9.0), training, torch.ones(2, 2))["copied"] == 0
    assert nearness(torch.ones(4, 2), training, torch.ones(2, 2))["copied"] == 0.5
    mixed = nearness(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), training, torch.tensor([[2.0, 0.0]]))
    assert mixed == {"nearest": pytest.approx(1.0), "nearest_heldout": 2.0, "copied": 0.5}


def test_without_held_out_images_training_images_stand_for_them():
    """Corners of a square of side 2, each 2 from the next."""
    square = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    found = nearness(square + torch.tensor([0.5, 0.0]), square)
    assert (found["nearest"], found["nearest_heldout"], found["copied"]) == (0.5, 2.0, 1.0)


def test_the_metric_reads_held_out_images_and_says_beside_what():
    how = evaluate.Settings(
        metrics=["nearest"],
        features="pixel",
        metric_options={"nearest_heldout": "digits:test"},
    )
    results, _, _ = evaluate.evaluate(["digits:train"], "digits:train", how)
    found = {score.name: score for score in results[0]}
    assert found["nearest"].value == pytest.approx(0, abs=1e-2)  # each is its own nearest
    assert found["copied"].value > 0.99
    assert found["nearest_heldout"].value > 1
    assert found["copied"].title == "samples nearer than held-out images over pixels"


def test_held_out_images_cannot_be_measured_without_a_network():
    gaussian = Gaussian(torch.zeros(2), torch.eye(2))
    stored = Statistics(gaussian, 3, {}, rows=torch.zeros(3, 2))
    with pytest.raises(UsageError, match=r"nearest_heldout digits: .* only statistics are given"):
        Nearest(nearest_heldout="digits").scores(stored, stored, Features())
