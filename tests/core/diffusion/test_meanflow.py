"""MeanFlow: its identity where the flow is known in closed form, its derivatives of real networks,
and what it makes of masks, guidance, and few steps.
"""

import json

import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import registry
from msmdiff.core.backbones.routes import Route
from msmdiff.core.config import section
from msmdiff.core.diffusion.meanflow import Way
from msmdiff.core.errors import UsageError
from msmdiff.core.layers import all_tokens
from msmdiff.core.model import Model
from msmdiff.core.samplers.times import visited
from msmdiff.core.seeding import stream
from msmdiff.core.training import checkpoint, cost
from msmdiff.core.training.trainer import train
from msmdiff.core.training.warmstart import next_stage

SAMPLING = {"sampler": "meanflow", "steps": 1, "clip": False}
MEANFLOW = {
    "process": {
        "schedule": "flow",
        "prediction": "average_velocity",
        "time_sampling": "logit_normal",
        "time_mean": -0.4,
    },
    "objective": {"name": "meanflow"},
    "sample": SAMPLING,
}
SIZE = {"name": None, "patch_size": 4, "hidden_size": 16, "num_heads": 2}
MODELS = {
    "dit": {"model": {**SIZE, "family": "dit", "depth": 2, "num_classes": 3}},
    "uvit": {"model": {**SIZE, "family": "uvit", "depth": 3, "num_classes": 3, "final_conv": True}},
}
MODERN = {"norm": "rms", "qk_norm": True, "mlp": "swiglu", "rope": True, "value_residual": True}
MODELS["modern"] = {"model": {**MODELS["dit"]["model"], **MODERN}}
MASKED = {"mask": {"ratio": 0.5}}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def parts_of(*layers):
    return road.build(road.resolve(configuration.build(MEANFLOW, MODELS["dit"], *layers), 3))


def draw(purpose, device="cpu"):
    return stream(device, 0, purpose, 0)


def learnt(network):
    """A network whose every number counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


# ------------------------------------------------------------------ where the flow is known

MEAN, VARIANCE = 0.7, 0.3


def spread_at(t):
    """The standard deviation of x_t for data of VARIANCE."""
    return ((1 - t) ** 2 * VARIANCE + t**2).sqrt()


def average(x, t, y=None, *, interval):
    """The exact average velocity for data N(MEAN, VARIANCE): the flow keeps (x_t - alpha_t MEAN) /
    spread_t.
    """
    t, r = (v.view(-1, 1, 1, 1).to(x) for v in (t, t - interval))
    slope = (r + t) - VARIANCE * (2 - r - t)
    return (x - (1 - t) * MEAN) * slope / (spread_at(t) * (spread_at(t) + spread_at(r))) - MEAN


@pytest.mark.parametrize("tangent", ["sample", "network"])
def test_the_exact_average_velocity_is_its_own_target(tangent):
    objective = parts_of({"objective": {"tangent": tangent}}).objective
    t = torch.linspace(0.1, 0.95, 12)
    r = t * torch.linspace(0, 1, 12)
    x = torch.randn(12, 3, 16, 16)
    # x0 and eps as x_t makes one expect them, so that the sample's velocity is the flow's.
    wide = t.view(-1, 1, 1, 1)
    gain = (1 - wide) * VARIANCE / spread_at(wide) ** 2
    x0 = MEAN + gain * (x - (1 - wide) * MEAN)
    eps = (x - (1 - wide) * x0) / wide
    way = Way(x, t, r, torch.zeros(12, dtype=torch.long), None, 12)
    terms = objective.averaged(average, x0, eps, way)
    assert terms["mse"].max() < 1e-9
    assert terms["correction"][:6].min() > 1e-3  # without du/dt the target would be another


def test_a_wrong_average_velocity_is_no_target_of_its_own():
    """The velocity in place of the average, which flow matching would accept."""
    objective = parts_of().objective

    def velocity(x, t, y, *, interval):
        return average(x, t, interval=torch.zeros_like(t))

    t = torch.full((4,), 0.8)
    x = torch.randn(4, 3, 16, 16)
    gain = 0.2 * VARIANCE / spread_at(t[0]) ** 2
    x0 = MEAN + gain * (x - 0.2 * MEAN)
    way = Way(x, t, 0 * t, torch.zeros(4, dtype=torch.long), None, 4)
    assert objective.averaged(velocity, x0, (x - 0.2 * x0) / 0.8, way)["mse"].min() > 0.05


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_of_the_exact_average_velocity_reach_the_data(steps):
    process = parts_of().process
    options = section("sample", sampler="meanflow", steps=steps)
    times = visited(process.schedule, options)
    assert torch.equal(times, torch.linspace(1, 0, steps + 1, dtype=torch.float64))

    def denoise(x, t, until):
        u = average(x, t.expand(len(x)), interval=(t - until).expand(len(x)))
        return process.split(u, x, t)

    start = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    entry = registry.find("sampler", "meanflow", "sample.sampler")
    x = entry.make(denoise, process.schedule, start, times, None)
    torch.testing.assert_close(x, MEAN + VARIANCE**0.5 * start, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------ real networks


@pytest.mark.parametrize("masked", [False, True], ids=["all", "visible"])
@pytest.mark.parametrize("family", MODELS)
def test_the_derivative_along_the_way_is_that_of_finite_differences(family, masked):
    parts = parts_of(MODELS[family], MASKED if masked else {})
    network, objective = learnt(parts.backbone), parts.objective
    x, v = torch.randn(2, 4, 3, 16, 16)
    t, r = torch.tensor([0.9, 0.6, 0.5, 0.3]), torch.tensor([0.1, 0.5, 0.0, 0.3])
    keep = parts.mask.draw(4, draw("mask")) if masked else None
    way = Way(x, t, r, torch.arange(4) % 3, Route(keep) if masked else None, 3)
    along = objective._answered(v, way.route)[:3]
    got = objective._correction(network, along, way)

    def at(step):
        moved = Way(x + step * v, t + step, r, way.y, way.route, 4)
        with torch.no_grad():
            return objective._ask(network, moved, r)

    step = 3e-3
    rate = (at(step) - at(-step)) / (2 * step)
    expected = (t - r).view(-1, *[1] * (rate.ndim - 1)) * rate
    assert got[:3].abs().amax(dim=tuple(range(1, got.ndim))).min() > 0.01
    torch.testing.assert_close(got[:3], expected[:3], rtol=1e-2, atol=3e-3)
    assert torch.equal(got[3], torch.zeros_like(got[3]))


@pytest.mark.parametrize("family", MODELS)
def test_at_equal_times_it_is_flow_matching_exactly(family):
    parts = parts_of(MODELS[family], {"objective": {"equal_times": 1.0}})
    network = learnt(parts.backbone)
    layers = {"process": {"schedule": "flow", "prediction": "velocity"}}
    flow = road.build(road.resolve(configuration.build(MODELS[family], layers), 3)).objective
    x0, eps = torch.randn(2, 4, 3, 16, 16)
    t, y = torch.rand(4), torch.arange(4) % 3
    flow.process.prediction.inputs = parts.process.prediction.inputs  # the same clock
    expected = flow.terms(network, x0, eps, t, y, None)["mse"]
    got = parts.objective.terms(network, x0, eps, t, y, None)
    assert torch.equal(got["mse"], expected)
    assert got["loss"].tolist() == pytest.approx(
        [(s / (s + 0.01)).item() for s in expected * x0[0].numel()]
    )


def test_the_adaptive_weight_has_no_gradient():
    parts = parts_of({"objective": {"adaptive_power": 0.5, "adaptive_offset": 2.0}})
    error = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = parts.objective._adaptive(error.square())
    assert loss.tolist() == pytest.approx([5 / 7**0.5, 25 / 27**0.5])
    loss.sum().backward()
    assert error.grad.flatten().tolist() == pytest.approx(
        [2 / 7**0.5, 4 / 7**0.5, 6 / 27**0.5, 8 / 27**0.5]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_average_velocity_has_a_gradient(checkpointing):
    """That of a target which was computed beforehand."""
    parts = parts_of({"objective": {"equal_times": 0.0, "adaptive_power": 0.0}})
    network = learnt(parts.backbone)
    network.gradient_checkpointing = checkpointing
    x0, eps = torch.randn(2, 4, 3, 16, 16)
    t, y = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.arange(4) % 3
    way = Way(x0, t, t / 3, y, None, 4)
    parts.objective.averaged(network, x0, eps, way)["loss"].sum().backward()
    got = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    x_t = parts.process.add_noise(x0, t, eps)
    way = Way(x_t, t, t / 3, y, None, 4)
    target = eps - x0 - parts.objective._correction(network, eps - x0, way)
    u = parts.objective._ask(network, way, way.r)
    (u - target).square().sum().backward()
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_compiled_blocks_learn_the_same():
    losses = []
    for compiled in (False, True):
        parts = parts_of({"objective": {"equal_times": 0.5}})
        network = learnt(parts.backbone)
        if compiled:
            for block in network.blocks:
                block.compile(backend="eager")
        x0, y = torch.ones(4, 3, 16, 16), torch.arange(4) % 3
        terms = parts.objective(network, x0, y, draw)
        losses.append((terms["mse"].item(), terms["correction"].item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] > 0


def test_hidden_patches_are_not_looked_at():
    parts = parts_of(MASKED)
    network = learnt(parts.backbone)
    x0, eps = torch.randn(2, 4, 3, 16, 16)
    t, y = torch.rand(4), torch.arange(4) % 3
    keep = parts.mask.draw(4, draw("mask"))
    hidden = torch.ones(4, 16, dtype=torch.bool).scatter(1, keep, False)
    place = hidden.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(place, 9.0, x0)
    way = Way(x0, t, t / 2, y, Route(keep), 4)
    one, two = (parts.objective.averaged(network, x, eps, way) for x in (x0, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    image = parts.objective._imaged(parts.objective._answered(x0, way.route), way)
    assert torch.equal(image, torch.where(place, 0.0, x0))


def test_the_guided_velocity_is_the_papers_mixture():
    parts = parts_of({"objective": {"guidance_omega": 0.8, "guidance_kappa": 0.5}})

    def network(x, t, y, *, interval):
        assert torch.equal(interval, torch.zeros(4))
        return torch.where(y == 3, 10.0, 1.0 * y).view(-1, 1, 1, 1).expand_as(x)

    t, y = torch.rand(4), torch.tensor([0, 1, 2, 3])  # the last one's label is dropped
    v = torch.full((4, 3, 16, 16), 2.0)
    way = Way(torch.zeros_like(v), t, t / 2, y, None, 2)
    guided, along = parts.objective._guided(network, v, way)
    expected = [0.8 * 2 + (1 - 0.8 - 0.5) * 10 + 0.5 * c for c in (0, 1, 2, 10)]
    assert guided[:, 0, 0, 0].tolist() == pytest.approx(expected)
    assert torch.equal(along, guided[:2])


def test_the_improved_form_follows_its_velocity_head():
    parts = parts_of({"objective": {"tangent": "head", "equal_times": 0.5}})
    network = learnt(parts.backbone)
    assert network.velocity_head is not None
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4) % 3
    t = torch.rand(4)
    way = Way(x, t, t / 2, y, None, 3)
    v = torch.zeros_like(x)
    learned, along = parts.objective._guided(network, v, way)
    assert torch.equal(learned, v)
    with torch.no_grad():
        told = network(x, t, y, interval=torch.zeros(4), velocity=True)
    torch.testing.assert_close(along, told[1][:3])
    terms = parts.objective.averaged(network, x, x, way)
    assert terms["loss"].min() > 1  # two adaptive terms, each just below 1
    terms["velocity_mse"].sum().backward()
    assert network.velocity_head.linear.weight.grad.abs().sum() > 0


def test_every_step_differentiates_something():
    """Processes that share a network's shards have to make the same passes, however few images
    each has; an image with r = t adds nothing.
    """
    objective = parts_of({"objective": {"equal_times": 0.75}}).objective
    passes = []

    def network(x, t, y, *, interval):
        if not torch.is_grad_enabled():
            passes.append(len(x))
        return x.sin()

    x0, y = torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    corrections = []
    for i in range(40):
        before = len(passes)
        found = objective(network, x0, y, lambda p, device="cpu", i=i: stream(device, 0, p, i))
        assert len(passes) > before
        corrections.append(found["correction"].item())
    assert 20 < sum(value == 0 for value in corrections) < 38


def test_half_of_the_images_have_equal_times_on_average():
    objective = parts_of({"objective": {"equal_times": 0.7}}).objective
    seen = []

    def network(x, t, y, *, interval):
        if not torch.is_grad_enabled():
            return torch.zeros_like(x)
        seen.append((t, interval))
        return torch.zeros_like(x)

    x0, y = torch.zeros(7, 3, 16, 16), torch.zeros(7, dtype=torch.long)
    for i in range(300):
        objective(network, x0, y, lambda p, device="cpu", i=i: stream(device, 0, p, i))
    t, interval = (torch.cat(values) for values in zip(*seen, strict=True))
    assert (interval > 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert interval.min() == 0
    assert (t - interval).min() > 0
    # Of two draws of sigmoid(-0.4 + n) the larger has the median sigmoid(-0.4 + 0.545).
    assert t.median() == pytest.approx(torch.tensor(-0.4 + 0.5449).sigmoid().item(), abs=0.02)


# ------------------------------------------------------------------ in a run

RUN = {
    "data": {"source": "digits", "image_size": 16},
    "model": {"num_classes": "auto"},
    "train": {"batch_size": 8, "steps": 6, "log_every": 1, "preview_every": 0},
    "ema": {"decays": [0.9]},
}


def numbers(run):
    state, networks = checkpoint.load(checkpoint.newest(run))
    flat = {f"{stem}/{k}": v for stem, tensors in networks.items() for k, v in tensors.items()}
    for i, values in state["optimizer"]["state"].items():
        flat |= {f"optimizer/{i}/{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return flat


@pytest.mark.parametrize("given", [{"guidance_kappa": 0.5}, {"tangent": "head"}], ids=str)
def test_a_run_resumes_bit_for_bit(tmp_path, quiet, given):
    layers = (MEANFLOW, MODELS["dit"], RUN, {"objective": given})
    train(configuration.build(*layers), tmp_path / "straight", quiet)
    train(configuration.build(*layers, {"train": {"steps": 2}}), tmp_path / "resumed", quiet)
    train(configuration.build(*layers), tmp_path / "resumed", quiet)
    one, two = numbers(tmp_path / "straight"), numbers(tmp_path / "resumed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    moved = one["model/interval_embed.fc2.weight"]
    assert moved.abs().sum() > 0


def test_from_the_command_line(cli, tmp_path):
    small = ["train.steps=2", "train.batch_size=8", "train.preview_every=0", "model.depth=2"]
    sets = [word for pair in small for word in ("--set", pair)]
    cli("train", "--config", "digits-meanflow", "--run", "m", *sets)
    line = json.loads((tmp_path / "runs/m/metrics.jsonl").read_text().splitlines()[-1])
    assert line["mse"] > 0
    assert line["correction"] >= 0
    cli("sample", "m", "--n", "3", "--steps", "2", "--out", "s")
    assert len(list((tmp_path / "s").glob("*.png"))) == 3
    done = cli("sample", "m", "--n", "2", "--set", "sample.end=0.1", "--out", "u", code=2)
    assert "sample.end 0.1 has no effect on the sampler meanflow" in done.stderr


def test_networks_of_one_time_are_refused_by_the_sampler():
    layers = {"process": {"schedule": "flow", "prediction": "velocity"}}
    config = road.resolve(configuration.build(MODELS["dit"], layers, {"sample": SAMPLING}), 3)
    parts = road.build(config)
    model = Model(parts.backbone, parts.process, parts.codec, parts.objective.condition, config)
    with pytest.raises(UsageError, match=r"is for networks trained with objective.name meanflow"):
        model.draw(2)


def test_any_sampler_takes_the_velocity_of_an_average_one():
    config = road.resolve(configuration.build(MEANFLOW, MODELS["dit"]), 3)
    parts = road.build(config)
    learnt(parts.backbone)
    model = Model(parts.backbone, parts.process, parts.codec, parts.objective.condition, config)
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    t = torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        velocity = parts.backbone(x, torch.full((2,), 0.5), y, interval=torch.zeros(2))
        estimate = model.denoiser(y)(x, t)
        average = parts.backbone(x, torch.full((2,), 0.5), y, interval=torch.full((2,), 0.2))
        few = model.denoiser(y)(x, t, t - 0.2)
    torch.testing.assert_close(estimate.eps - estimate.x0, velocity)
    torch.testing.assert_close(few.eps - few.x0, average)
    assert not torch.allclose(average, velocity)


def test_passes_without_a_gradient_are_counted():
    def counted(**given):
        layers = (MEANFLOW, MODELS["dit"], {"objective": given})
        return cost.measure(road.resolve(configuration.build(*layers), 3))

    plain = counted(equal_times=1.0)
    assert plain.step_flops == 3 * plain.forward_flops
    assert counted(equal_times=0.75).step_flops == pytest.approx(3.5 * plain.forward_flops)
    guided = counted(equal_times=0.75, guidance_kappa=0.5)
    assert guided.step_flops == pytest.approx(5.5 * plain.forward_flops)
    improved = counted(equal_times=0.5, tangent="network")
    assert improved.step_flops == pytest.approx(4.5 * plain.forward_flops)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([{"process": {"prediction": "velocity"}}], "process.prediction average_velocity, not vel"),
        ([{"objective": {"loss": "l1"}}], "needs objective.loss mse, not l1"),
        ([MASKED, {"mask": {"route": "tread"}}], "mask.route visible, not tread"),
        ([{"model": {"velocity_head": True}}], "learns from objective.tangent head only"),
        (
            [{"model": {"velocity_head": True}, "objective": {"name": "dsm"}}],
            "learns from objective.tangent head only",
        ),
        ([{"objective": {"name": "dsm"}}], "is learnt with objective.name meanflow only, not dsm"),
        (
            [{"model": {"num_classes": 0}, "objective": {"guidance_kappa": 0.5}}],
            "ask for guidance, and the network knows no classes",
        ),
        (
            [{"objective": {"guidance_kappa": 0.5, "label_dropout": 0.0}}],
            "set objective.label_dropout",
        ),
        (
            [{"sample": {"times": "logsnr", "steps": 2}}],
            "sample.times logsnr do not reach from pure noise",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(layers, words):
    with pytest.raises(UsageError, match=words):
        parts_of(*layers)


def test_a_family_that_knows_no_intervals_is_refused():
    family = {"family": "mdtv2", "depth": 4, "decode_layers": 2}
    with pytest.raises(UsageError, match=r"model.family mdtv2 is not: use dit or uvit"):
        parts_of({"model": family})


def test_a_next_stage_of_all_tokens_goes_on_with_it():
    given = {"objective": {"guidance_kappa": 0.3}}
    first = road.resolve(configuration.build(MEANFLOW, MODELS["dit"], MASKED, given), 3)
    layer = next_stage(first)
    second = configuration.build(layer, all_tokens(first.objective.name))
    second = road.resolve(second, 3)
    assert second.objective.name == "meanflow"
    assert second.objective.guidance_kappa == 0.3
    assert second.mask.ratio == 0
    assert all_tokens("msm")["objective"] == {"name": "dsm"}


@pytest.mark.parametrize("named", ["auto", "dsm"])
def test_a_next_stage_of_another_objective_inherits_neither_its_options_nor_its_head(named):
    given = {"objective": {"guidance_kappa": 0.3, "tangent": "head"}}
    first = road.resolve(configuration.build(MEANFLOW, MODELS["dit"], given), 3)
    assert first.model.velocity_head is True
    flow = {"process": {"prediction": "velocity"}, "objective": {"name": named}}
    sampler = {"sample": {"sampler": "heun"}}
    layers = (next_stage(first), all_tokens("meanflow"), flow, sampler)
    second = road.resolve(configuration.build(*layers), 3)
    assert second.objective.name == "dsm"
    assert second.model.velocity_head is False
    assert second.model.interval_embed is True
    assert "guidance_kappa" not in second.objective.model_dump()
    third = road.resolve(configuration.build(next_stage(first), all_tokens("meanflow")), 3)
    assert third.model.velocity_head is True


def test_a_meanflow_run_is_fine_tuned_by_a_preset_of_flow_matching(cli, tmp_path):
    small = ["train.steps=1", "train.batch_size=8", "train.preview_every=0", "model.depth=2"]
    sets = [word for pair in small for word in ("--set", pair)]
    cli(
        "train",
        "--config",
        "digits-meanflow",
        "--run",
        "m",
        *sets,
        "--set",
        "objective.tangent=head",
    )
    cli("finetune", "--ckpt", "m", "--config", "digits-flow", "--run", "f", *sets)
    again = configuration.preset(str(tmp_path / "runs/f/config.yaml"))
    assert again["objective"]["name"] == "dsm"
    assert again["model"]["velocity_head"] is False


def test_a_network_without_the_embedding_keeps_its_names():
    plain = road.resolve(configuration.build(MODELS["uvit"]), 3)
    names = set(road.build(plain).backbone.state_dict())
    more = set(parts_of(MODELS["uvit"]).backbone.state_dict())
    assert {name.partition(".")[0] for name in more - names} == {"interval_embed"}
    assert names < more


def test_the_embedding_starts_at_zero():
    network = parts_of().backbone
    for parameter in network.final.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 16, 16), torch.rand(2)
    one, two = (network(x, t, interval=interval) for interval in (None, t))
    assert torch.equal(one, two)
