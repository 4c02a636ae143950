import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.backbones.layers import patchify
from msmdiff.core.seeding import stream


def parts_of(*layers):
    return road.build(road.resolve(configuration.build(*layers)))


def draw(purpose):
    return stream("cpu", 0, purpose, 0)


MASKED = {"objective": {"name": "msm"}, "mask": {"ratio": 0.75}}


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_masked_loss_is_the_mean_over_visible_tokens(loss):
    parts = parts_of(MASKED, {"objective": {"loss": loss}, "process": {"prediction": "v", "weighting": "min_snr"}})
    x0, eps = torch.randn(2, 5, 3, 16, 16)
    t = parts.process.sample_t(5, draw("time"))
    keep = parts.mask.draw(5, draw("mask"))

    def network(x_t, time, y, kept):
        assert torch.equal(kept, keep)
        assert torch.equal(time, (t * 1000).round() - 1)
        return torch.full((5, parts.mask.kept, 12), 0.3)

    got = parts.objective.loss(network, x0, eps, t, None, keep)
    target = patchify(parts.process.target(x0, eps, t), 2)
    per_image = []
    for i in range(5):
        error = 0.3 - target[i, keep[i]]
        per_image.append((error.abs() if loss == "l1" else error**2).mean() * parts.process.weight(t)[i])
    assert got == pytest.approx(sum(per_image).item() / 5, rel=1e-5)


def test_a_perfect_network_has_no_loss():
    parts = parts_of({"process": {"prediction": "x0"}})
    x0 = torch.randn(4, 3, 16, 16)
    assert parts.objective(lambda *_: x0, x0, None, draw)["loss"] == 0


@pytest.mark.parametrize("codec", [{}, {"codec": {"name": "dwt"}}])
def test_hidden_pixels_have_no_gradient(codec):
    parts = parts_of(MASKED, codec)
    x0 = torch.randn(3, *parts.codec.shape, requires_grad=True)
    parts.objective(parts.backbone, x0, None, draw)["loss"].backward()
    keep = parts.mask.draw(3, draw("mask"))
    touched = patchify(x0.grad, 2).abs().sum(-1) > 0
    assert torch.equal(touched, torch.zeros(3, parts.mask.tokens, dtype=torch.bool).scatter(1, keep, True))


def test_masked_scores_of_the_full_grid_equal_denoising_score_matching():
    full = parts_of({"model": {"num_classes": 10}})
    none_hidden = parts_of({"model": {"num_classes": 10}, "objective": {"name": "msm"}, "mask": {"ratio": 0.001}})
    none_hidden.backbone.load_state_dict(full.backbone.state_dict())
    x0, y = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 3])
    losses = [p.objective(p.backbone, x0, y, draw)["loss"].item() for p in (full, none_hidden)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.25, 200, 300), (1.0, 1000, 1000)])
def test_labels_are_dropped_at_their_rate(rate, low, high):
    parts = parts_of({"model": {"num_classes": 10}, "objective": {"label_dropout": rate}})
    seen = []

    def network(x_t, time, y, keep):
        seen.append(y)
        return torch.zeros_like(x_t)

    labels = torch.arange(1000) % 10
    parts.objective(network, torch.zeros(1000, 3, 16, 16), labels, draw)
    dropped = seen[0] == 10
    assert low <= dropped.sum() <= high
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def test_an_unconditional_network_gets_no_labels():
    parts = parts_of({})

    def network(x_t, time, y, keep):
        assert y is None
        return torch.zeros_like(x_t)

    parts.objective(network, torch.zeros(2, 3, 16, 16), torch.tensor([1, 2]), draw)
