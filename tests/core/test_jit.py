"""JiT: large patches of pixels, x0 prediction with the velocity's loss, and class tokens."""

import pytest
import torch
from test_blocks import ALL, EVERYONE
from test_routes import KEEP, SIZES, SPARSE, batch, make, sparse_route, tread
from test_training import assert_same_bits

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets, weights
from msmdiff.core.backbones.layers import patchify
from msmdiff.core.backbones.routes import Route
from msmdiff.core.config import section
from msmdiff.core.diffusion import process, time_sampling, variational
from msmdiff.core.errors import UsageError
from msmdiff.core.seeding import stream
from msmdiff.core.training import cost, trainer
from msmdiff.core.training.run import Run

BLOCKS = {key: value for key, value in ALL.items() if key != "value_residual"}
TOKENS = dict(class_tokens=3, class_tokens_at=3)
JIT = dict(bottleneck=5, **TOKENS, **BLOCKS)


def flow(**fields):
    return process.build(section("process", schedule="flow", **fields))


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_the_velocity_weighting_is_the_squared_error_of_the_velocity(noise_scale):
    made = flow(prediction="x0", weighting="velocity", noise_scale=noise_scale)
    x0, eps, output = torch.randn(3, 6, 3, 4, 4)
    t = torch.tensor([0.01, 0.04, 0.06, 0.3, 0.8, 0.999])
    found = variational.terms(made, output, x0, eps, t)["mse"]
    x_t, held = made.add_noise(x0, t, eps), t.clamp(min=0.05).view(-1, 1, 1, 1)
    u, u_hat = (x_t - x0) / held, (x_t - output) / held
    torch.testing.assert_close(found, (u - u_hat).square().flatten(1).mean(1))
    later = t > 0.05  # where u is the flow's velocity
    velocity = (noise_scale * eps - x0)[later]
    torch.testing.assert_close(u[later], velocity, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_a_velocity_network_has_that_loss_by_itself(noise_scale):
    plain = flow(prediction="velocity", noise_scale=noise_scale)
    weighted = flow(prediction="velocity", weighting="velocity", noise_scale=noise_scale)
    t = torch.tensor([0.06, 0.5, 0.9])
    torch.testing.assert_close(weighted.weight(t), plain.weight(t))
    assert weighted.weight(torch.tensor([0.025])).item() == pytest.approx(0.25)


def test_a_scaled_flow_is_the_flow_of_smaller_images():
    """x / 2 of noise scale 2 is x0 / 2 on the flow of scale 1, at the same times."""
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    one, two = flow().schedule, flow(noise_scale=2.0).schedule
    assert torch.equal(two.alpha_sigma(t)[1], 2 * one.alpha_sigma(t)[1])
    torch.testing.assert_close(two.log_snr(t), one.log_snr(t) - 2 * torch.tensor(2.0).log())
    torch.testing.assert_close(two.time_at(two.log_snr(t)), t)
    assert torch.equal(two.rates(t)[1], 2 * one.rates(t)[1])
    assert torch.equal(two.diffusion(t), 4 * one.diffusion(t))
    assert (two.start_std, one.start_std) == (2.0, 1.0)


@pytest.mark.parametrize("name", ["jit-b-16", "jit-b-32"])
def test_times_are_drawn_as_the_paper_does(name):
    config = road.resolve(configuration.build(presets.read(name)))
    made = process.build(config.process)
    sampling = time_sampling.build(config.process, made.schedule)
    times, _ = sampling.draw(20_000, lambda purpose, device="cpu": stream("cpu", 0, purpose))
    normal = times.double().logit()
    assert normal.mean().item() == pytest.approx(0.8, abs=0.02)
    assert normal.std().item() == pytest.approx(0.8, abs=0.02)
    level = made.schedule.alpha_sigma(torch.tensor(0.9, dtype=torch.float64))
    assert config.sample.cfg_interval[1] == pytest.approx((level[1] / level[0]).item())


@pytest.mark.parametrize(
    ("name", "millions", "tokens"), [("jit-b-16", 131, 256), ("jit-h-16", 953, 256)]
)
def test_published_sizes_have_the_published_numbers(name, millions, tokens):
    config = road.resolve(configuration.build(presets.read(name)))
    counted = cost.measure(config)
    assert counted.parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert counted.tokens == tokens


def test_it_learns_draws_and_resumes(tmp_path, quiet):
    """With a mask, as a primer; the whole run on a grid of 16 tokens takes seconds."""

    def go(steps, run):
        small = {"steps": steps, "batch_size": 32, "preview_every": 0, "log_every": 1}
        layers = (
            {"mask": {"ratio": 0.5}, "train": small},
            {"optim": {"warmup_steps": 2, "schedule": "constant"}},
        )
        config = configuration.build(
            presets.read("digits-jit"), {"objective": {"name": "msm"}}, *layers
        )
        trainer.train(config, tmp_path / run, quiet)

    go(16, "straight")
    go(12, "resumed")
    go(16, "resumed")
    assert_same_bits(tmp_path / "straight", tmp_path / "resumed")
    losses = [line["loss"] for line in Run(tmp_path / "straight", writes=False).metrics()]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    model = weights.load(tmp_path / "straight", layers=[{"sample": {"steps": 2}}])
    images = model.draw(seeds=range(2), classes=[3, 7])
    assert len(images) == 2


# ------------------------------------------------------------------ class tokens


def test_class_tokens_are_cut_off_and_change_what_is_said():
    network = make("dit", **JIT)
    x, t, y = batch()
    told = network(x, t, y)
    assert told.shape == x.shape
    with torch.no_grad():
        network.class_embed += 1
    assert not torch.allclose(network(x, t, y), told, atol=1e-3)


def test_they_join_where_they_are_told_to():
    """Blocks before that see the patches only."""
    network = make("dit", **TOKENS)
    seen = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    network(*batch())
    assert seen == [64, 64, 64, 67, 67, 67, 67, 67]
    seen.clear()
    network(*batch(), Route(KEEP))
    assert seen == [4, 4, 4, 7, 7, 7, 7, 7]
    seen.clear()
    network(*batch(), tread(network, KEEP))
    assert seen == [64, 64, 4, 7, 7, 7, 67, 67]


@pytest.mark.parametrize("options", [TOKENS, JIT], ids=["tokens", "jit"])
def test_keeping_every_token_is_the_dense_pass_to_the_last_bit(options):
    network = make("dit", **options)
    x, t, y = batch()
    dense = network(x, t, y)
    assert torch.equal(network(x, t, y, Route(EVERYONE)), patchify(dense, 2))
    assert torch.equal(network(x, t, y, tread(network, EVERYONE)), dense)


@pytest.mark.parametrize("part", SPARSE)
def test_class_tokens_travel_through_sparse_parts(part):
    sizes = SPARSE[part] | {"sparse_width": 16, "sparse_heads": 2}
    network = make("dit", **sizes, **JIT)
    x, t, y = batch()
    dense = network(x, t, y)
    kept = network(x, t, y, sparse_route(part, network, EVERYONE))
    assert torch.equal(kept, patchify(dense, 2) if part == "mixer" else dense)
    network(x, t, y, sparse_route(part, network, KEEP)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_without_labels_they_are_tokens_of_their_own():
    network = make("dit", **TOKENS)
    x, t, y = batch()
    null = network(x, t, torch.full((2,), 3))
    assert torch.equal(network(x, t), null)
    assert not torch.allclose(network(x, t, y), null, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(class_tokens=2, class_tokens_at=8), r"class_tokens_at 8 must be .* below 8"),
        (dict(class_tokens_at=2), r"class_tokens_at 2 has no effect without model.class_tokens"),
        (dict(**TOKENS, value_residual=True), r"join at block 3 .* no values of the first block"),
        (dict(**TOKENS, amm=[2]), r"model.amm \[2\] modulates .* model.class_tokens .* use off"),
    ],
)
def test_class_tokens_that_fit_nowhere_are_refused(options, words):
    model = dict(name=None, family="dit", **SIZES["dit"], **options)
    with pytest.raises(UsageError, match=words):
        road.resolve(configuration.build({"model": model}))


def test_a_bottleneck_narrows_what_a_patch_can_say():
    network = make("dit", bottleneck=5)
    narrow, wide = network.patch_embed
    assert narrow.weight.shape == (5, 12)
    assert narrow.bias is None
    assert wide.weight.shape == (16, 5)
    assert "patch_embed.weight" in make("dit").state_dict()
