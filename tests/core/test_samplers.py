import json

import numpy as np
import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import ProcessConfig, SampleConfig
from msmdiff.core.diffusion.process import build
from msmdiff.core.errors import UsageError
from msmdiff.core.samplers import SAMPLERS, guidance
from msmdiff.core.samplers.generate import generate
from msmdiff.core.samplers.times import GRIDS


def gaussian_denoiser(process, mean, variance):
    """The exact posterior mean of x0 for data N(mean, variance)."""

    def denoise(x, t):
        alpha, sigma = (v.view(-1, 1).to(x) for v in process.alpha_sigma(t.double()))
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return process.split((x - alpha * x0) / sigma, x, t)

    return denoise


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", dict(eta=0.0)),
        ("ddim", dict(eta=1.0)),
        ("ddpm", dict(variance="small")),
        ("ddpm", dict(variance="large")),
    ],
)
def test_an_analytic_gaussian_is_recovered(schedule, sampler, options):
    process = build(ProcessConfig(schedule=schedule))
    mean, variance = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([0.3, 1.5], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(20_000, 2, generator=generator, dtype=torch.float64)

    options = SampleConfig(sampler=sampler, **options)
    times = GRIDS["even"](1000, 500)
    x = SAMPLERS[sampler](gaussian_denoiser(process, mean, variance), process, noise(), times, noise, options)
    assert torch.allclose(x.mean(0), mean, atol=0.03)
    assert torch.allclose(x.var(0), variance, rtol=0.05)
    assert abs(torch.corrcoef(x.T)[0, 1]) < 0.03


def test_ddim_converges_at_first_order():
    process = build(ProcessConfig(schedule="linear"))
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.25, dtype=torch.float64)
    start = torch.tensor([[1.3]], dtype=torch.float64)

    def end(steps):
        denoise = gaussian_denoiser(process, mean, variance)
        return SAMPLERS["ddim"](denoise, process, start, GRIDS["even"](1000, steps), None, SampleConfig()).item()

    exact = end(1000)
    errors = [abs(end(s) - exact) for s in (10, 20, 40)]
    assert errors[0] > errors[1] > errors[2]
    assert 1.5 < errors[0] / errors[1] < 3


@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("steps", [1, 7, 250, 1000])
def test_time_grids_fall_from_noise_to_the_image(grid, steps):
    times = GRIDS[grid](1000, steps)
    assert len(times) == steps + 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert steps == 1 or times[0] == 1
    with pytest.raises(UsageError, match=r"sample.steps 1001 must lie between 1 and .* 1000"):
        GRIDS[grid](1000, 1001)


def test_maskdm_grid_is_the_published_one(golden):
    published = json.loads((golden / "maskdm_math" / "case.json").read_text())["ddim_times"]["times_by_sampling_steps"]
    for steps, indices in published.items():
        times = GRIDS["maskdm"](1000, int(steps))
        assert ((times * 1000).round().int() - 1).tolist() == indices


def tiny(num_classes=0, **layers):
    torch.manual_seed(1)
    config = road.resolve(configuration.build({"model": {"num_classes": num_classes}}, layers))
    parts = road.build(config)
    for p in parts.backbone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return parts


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_seed_is_the_same_image_at_any_batch_size(sampler):
    parts, options = tiny(10), SampleConfig(sampler=sampler, steps=5, eta=1.0, cfg_scale=1.5)
    sets = []
    for batch_size in (1, 3, 8):
        out = generate(
            parts.backbone, parts.process, parts.codec, options, range(3, 11), [s % 10 for s in range(3, 11)],
            num_classes=10, batch_size=batch_size,
        )  # fmt: skip
        sets.append(torch.cat([b.images for b in out]).int())
    assert (sets[0] - sets[1]).abs().max() <= 1
    assert (sets[0] - sets[2]).abs().max() <= 1
    assert len(sets[0].flatten(1).unique(dim=0)) == 8


@pytest.mark.parametrize("codec", [{}, {"codec": {"name": "dwt"}}])
def test_samples_are_images(codec):
    parts = tiny(**codec)
    (batch,) = generate(parts.backbone, parts.process, parts.codec, SampleConfig(steps=3), [0, 5])
    assert batch.images.shape == (2, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.seeds == [0, 5]


def test_guidance_is_linear_in_the_scale():
    def network(x, t, y):
        return torch.where(y[:, None] == 9, torch.zeros(len(y), 1), y[:, None].float())

    x, t, y = torch.zeros(3, 1), torch.zeros(3), torch.tensor([1, 2, 3])
    for scale in (0.0, 1.0, 1.4, 4.0):
        got = guidance.classifier_free(network, 9, scale)(x, t, y)
        assert torch.allclose(got, scale * y[:, None].float())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [([0, 1], {}, "unconditional"), (None, {"cfg_scale": 2.0}, "unconditional")],
)
def test_an_unconditional_network_refuses_classes(labels, options, message):
    parts = tiny()
    with pytest.raises(UsageError, match=message):
        list(generate(parts.backbone, parts.process, parts.codec, SampleConfig(**options), [0, 1], labels))


def test_labels_out_of_range_are_refused():
    parts = tiny(10)
    with pytest.raises(UsageError, match=r"0\.\.9"):
        list(generate(parts.backbone, parts.process, parts.codec, SampleConfig(), [0], [10], num_classes=10))


def test_clipping_keeps_x0_in_range_and_eps_consistent():
    from msmdiff.core.samplers.generate import denoiser

    parts = tiny()
    x, t = torch.randn(2, 3, 16, 16) * 3, torch.tensor([0.5, 0.9])
    for rule in ("derived", "raw"):
        options = SampleConfig(eps_after_clip=rule)
        p = denoiser(parts.backbone, parts.process, parts.codec, options, None)(x, t)
        assert p.x0.abs().max() <= 1
        again = parts.process.add_noise(p.x0, t, p.eps)
        assert torch.allclose(again, x, atol=1e-4) == (rule == "derived")
    assert np.isfinite(p.eps.detach().numpy()).all()
