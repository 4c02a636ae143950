"""Guidance of networks that were trained with few tokens: away from fewer still (sparse guidance),
or from a dropped path (SPRINT).
"""

import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import condition as conditions
from msmdiff.core import config as configuration
from msmdiff.core.backbones.routes import Route
from msmdiff.core.diffusion import routing
from msmdiff.core.errors import UsageError
from msmdiff.core.model import Model
from msmdiff.core.seeding import SeedNoise

DIT = dict(name=None, family="dit", patch_size=2, hidden_size=16, depth=8, num_heads=2)


def make(num_classes=3, mask=None, **sample):
    """A model of random numbers, whose network notes the routes that it is asked for."""
    layers = {
        "model": {**DIT, "num_classes": num_classes},
        "mask": {"ratio": 0.5, **(mask or {})},
        "process": {"schedule": "flow", "prediction": "velocity"},
        "sample": {"steps": 3, "sampler": "euler", "times": "uniform", **sample},
    }
    config = road.resolve(configuration.build(layers))
    torch.manual_seed(0)
    parts = road.build(config)
    for parameter in parts.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Model(
        backbone=parts.backbone.eval(),
        process=parts.process,
        codec=parts.codec,
        condition=conditions.of(config.model),
        config=config,
    )


def estimate(model, scale, weak):
    """x0 at one time, for y = 1 of two images."""
    model.config.sample.cfg_scale = scale
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    denoise = model.denoiser(torch.tensor([1, 1]), weak=weak)
    with torch.no_grad():
        return denoise(x, torch.tensor(0.5, dtype=torch.float64)).x0


def test_sparse_guidance_leads_away_from_the_same_label_with_few_tokens():
    model = make(mask={"route": "tread"}, clip=False)
    keep = torch.tensor([[3, 9, 40, 63], [0, 1, 2, 50]])
    route = Route(keep, 2, 4, "own", "all")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor(0.5, dtype=torch.float64), torch.tensor([1, 1])
    with torch.no_grad():
        strong, weak = (
            model.process.split(model.process.feed(model.backbone, x, t, y, way), x, t).x0
            for way in (None, route)
        )
    assert not torch.allclose(strong, weak, atol=1e-3)
    expected = weak + 2.5 * (strong - weak)
    torch.testing.assert_close(estimate(model, 2.5, lambda: route), expected, atol=1e-5, rtol=1e-5)


def test_path_drop_guidance_leads_away_from_the_null_without_the_middle():
    model = make(mask={"route": "sprint"}, clip=False)
    route = Route(fill="mask", scored="all", dropped=True)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        strong, weak = (
            model.process.split(model.process.feed(model.backbone, x, t, y, way), x, t).x0
            for y, way in ((torch.tensor([1, 1]), None), (torch.tensor([3, 3]), route))
        )
    expected = weak + 3 * (strong - weak)
    torch.testing.assert_close(estimate(model, 3.0, lambda: route), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "against"),
    [({"route": "tread"}, "route"), ({"route": "sprint"}, "route"), ({"route": "sprint"}, "path")],
)
def test_a_seed_is_one_image_in_any_batch_and_the_guidance_matters(mask, against):
    model = make(mask=mask, cfg_scale=2.0, cfg_against=against)
    whole = model.draw(range(5), 1)
    assert torch.equal(torch.cat([model.draw([seed], 1) for seed in range(5)]), whole)
    model.config.sample.cfg_against = "null"
    assert not torch.equal(model.draw(range(5), 1), whole)


def test_a_network_without_labels_can_be_guided_by_its_route():
    model = make(num_classes=0, mask={"route": "tread"}, cfg_scale=2.0, cfg_against="route")
    guided = model.draw(range(2))
    model.config.sample.cfg_scale = 1.0
    assert not torch.equal(model.draw(range(2)), guided)


def test_as_many_tokens_are_hidden_as_asked():
    model = make(mask={"route": "tread"}, cfg_scale=2.0, cfg_against="route", cfg_hidden=0.75)
    noise = SeedNoise([0, 1], (3, 16, 16), "cpu")
    weak = routing.weak_route(model.config.sample, model.config.mask, model.backbone, noise)
    first, second = weak().keep, weak().keep
    assert first.shape == (2, 16)
    assert not torch.equal(first, second)


def test_what_the_network_cannot_do_is_refused():
    with pytest.raises(UsageError, match=r"path needs a network with model\.sparse fusion"):
        make(cfg_scale=2.0, cfg_against="path").draw([0], 1)
