"""What blocks of new networks may be made of: each against its closed form, and all of them along
every route.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_routes import KEEP, SIZES, SPARSE, batch, make, sparse_route, tread
from test_training import assert_same_bits, small
from torch._dynamo.testing import CompileCounter

from msmdiff.core import backbones, weights
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.backbones.blocks import (
    Attention,
    BlockOptions,
    Mlp,
    RMSNorm,
    SwiGLU,
    normalise,
    places_of,
    rotate,
)
from msmdiff.core.backbones.layers import gather_tokens, patchify
from msmdiff.core.backbones.routes import Route, compile_blocks
from msmdiff.core.errors import UsageError
from msmdiff.core.training import cost, warmstart
from msmdiff.core.training.trainer import train
from msmdiff.core.weights import published

ALL = dict(norm="rms", qk_norm=True, mlp="swiglu", rope=True, value_residual=True)
EACH = [{name: value} for name, value in ALL.items()]
EVERYONE = torch.arange(64).expand(2, -1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ one by one


def test_the_rms_norm_is_torchs():
    x, norm = 3 * normal(2, 5, 8), RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    expected = F.rms_norm(x, (8,), norm.weight, eps=1e-6)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(normalise(x, "rms").square().mean(-1), torch.ones(2, 5))
    torch.testing.assert_close(normalise(x), F.layer_norm(x, (8,), eps=1e-6))


def test_a_swiglu_has_as_many_parameters_as_the_mlp_that_it_replaces():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    gelu, gated = Mlp(96, 384), SwiGLU(96, 384)
    assert gated.fc1.weight.shape == (512, 96)
    assert count(gated) == pytest.approx(count(gelu), rel=0.01)
    x = normal(3, 96)
    gate, value = (x @ gated.fc1.weight.T + gated.fc1.bias).split(256, dim=-1)
    expected = (gate * torch.sigmoid(gate) * value) @ gated.fc2.weight.T + gated.fc2.bias
    torch.testing.assert_close(gated(x), expected)


def test_scores_of_turned_vectors_depend_on_the_offset_of_their_places_only():
    places, q, k = places_of((5, 6)), normal(8), normal(8, seed=1)
    assert places[0, 13].tolist() == [2.0, 1.0]
    turned = [rotate(v.expand(1, 1, 30, 8), places)[0, 0] for v in (q, k)]
    scores = (turned[0] @ turned[1].T).view(5, 6, 5, 6)  # row, column of either
    torch.testing.assert_close(scores[:4, :5, :4, :5], scores[1:, 1:, 1:, 1:])
    torch.testing.assert_close(scores[2, 3, 2, 3], q @ k)
    assert (scores[0, 0, 0, 1] - scores[0, 1, 0, 0]).abs() > 1e-3  # left is not right
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3  # nor is a row a column
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(30))


def test_a_turn_by_one_row_is_the_rotation_that_it_says():
    x = torch.tensor(
        [1.0, 2, 3, 4, 5, 6, 7, 8]
    )  # pairs (1, 5), (2, 6) by row, (3, 7), (4, 8) by column
    turned = rotate(x.view(1, 1, 1, 8), torch.tensor([[[1.0, 0.0]]])).flatten()
    angle = torch.tensor([1.0, 0.01])  # 10000^(-0 / 2), 10000^(-1 / 2)
    cos, sin = angle.cos(), angle.sin()
    torch.testing.assert_close(turned[:2], x[:2] * cos - x[4:6] * sin)
    torch.testing.assert_close(turned[4:6], x[:2] * sin + x[4:6] * cos)
    assert torch.equal(turned[[2, 3, 6, 7]], x[[2, 3, 6, 7]])


def test_special_tokens_are_not_turned():
    places = places_of((3, 3), extras=2)
    assert places.shape == (1, 11, 2)
    x = normal(1, 2, 11, 8)
    assert torch.equal(rotate(x, places)[:, :, :3], x[:, :, :3])  # and neither is (0, 0)


def test_gathering_tokens_with_their_places_commutes_with_attention():
    attn = Attention(16, 2, options=BlockOptions(**ALL | {"value_residual": False}))
    x, places = normal(2, 64, 16), places_of((8, 8))
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    whole, _ = attn(x, places=places)
    gathered, _ = attn(gather_tokens(x, order), places=gather_tokens(places, order))
    torch.testing.assert_close(gathered, gather_tokens(whole, order), atol=1e-6, rtol=1e-5)


def test_queries_and_keys_have_unit_size_whatever_comes_in():
    attn = Attention(16, 2, options=BlockOptions(qk_norm=True))
    with torch.no_grad():
        attn.qkv.weight[:32] *= 100  # of q and k
    big, _ = attn(normal(1, 6, 16))
    with torch.no_grad():
        attn.qkv.weight[:32] /= 100
    small, _ = attn(normal(1, 6, 16))
    torch.testing.assert_close(big, small, atol=1e-4, rtol=1e-4)


def test_values_are_mixed_with_the_first_ones_by_the_share():
    options = BlockOptions(value_residual=True)
    giving = Attention(16, 2, options=options, first=True)
    mixing, plain = Attention(16, 2, options=options), Attention(16, 2)
    plain.load_state_dict(mixing.state_dict(), strict=False)
    x, other = normal(2, 5, 16), normal(2, 5, 16, seed=1)
    values = giving(other)[1]
    assert torch.equal(values, other @ giving.qkv.weight[32:].T)
    assert mixing.value_share.item() == 0.5
    with torch.no_grad():
        mixing.value_share.fill_(0.0)
        assert torch.equal(mixing(x, first_values=values)[0], plain(x)[0])
        mixing.value_share.fill_(1.0)
        plain.qkv.weight[32:] = 0
        only = plain.proj.bias.expand(2, 5, -1)
        assert torch.equal(plain(x)[0], only)
        got = mixing(x, first_values=torch.ones(2, 5, 16))[0]
    expected = (torch.ones(2, 5, 16) @ mixing.proj.weight.T + mixing.proj.bias).detach()
    torch.testing.assert_close(got, expected)  # the mean of equal values


# ------------------------------------------------------------------ networks


@pytest.mark.parametrize("family", ["uvit", "dit"])
def test_off_is_the_network_that_it_was(family):
    network = make(family)
    assert not any("norm.weight" in n and "attn" in n for n in network.state_dict())
    assert not any("value_share" in n for n in network.state_dict())
    assert network.places is None
    assert make(family, **BlockOptions().model_dump()).state_dict().keys() == (
        network.state_dict().keys()
    )


@pytest.mark.parametrize("family", ["uvit", "dit"])
@pytest.mark.parametrize("options", [*EACH, ALL], ids=[*ALL, "all"])
def test_keeping_every_token_is_the_dense_pass_to_the_last_bit(family, options):
    network = make(family, **options)
    x, t, y = batch()
    dense = network(x, t, y)
    assert not torch.equal(dense, make(family)(x, t, y))
    assert torch.equal(network(x, t, y, Route(EVERYONE)), patchify(dense, 2))
    assert torch.equal(network(x, t, y, tread(network, EVERYONE)), dense)


@pytest.mark.parametrize("family", ["uvit", "dit"])
@pytest.mark.parametrize("part", SPARSE)
def test_sparse_parts_too(family, part):
    network = make(family, **SPARSE[part] | {"sparse_width": 16, "sparse_heads": 2}, **ALL)
    x, t, y = batch()
    dense = network(x, t, y)
    kept = network(x, t, y, sparse_route(part, network, EVERYONE))
    assert torch.equal(kept, patchify(dense, 2) if part == "mixer" else dense)
    network(x, t, y, sparse_route(part, network, KEEP)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("family", ["uvit", "dit"])
@pytest.mark.parametrize("option", ["rope", "value_residual"])
def test_tokens_in_another_order_are_the_same_tokens(family, option):
    network = make(family, **{option: ALL[option]})
    x, t, y = batch()
    some = torch.stack([torch.randperm(64)[:20], torch.randperm(64)[:20]])
    order = torch.randperm(20)
    for route in (Route, lambda keep: tread(network, keep)):
        one, other = (network(x, t, y, route(keep)) for keep in (some, some[:, order]))
        expected = one[:, order] if one.ndim == 3 else one
        torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["uvit", "dit"])
def test_blocks_that_are_computed_again_give_the_same_gradients(family):
    x, t, y = batch()
    found = []
    for again in (False, True):
        network = make(family, **ALL).train()
        network.gradient_checkpointing = again
        network(x, t, y, tread(network, KEEP)).square().mean().backward()
        found.append({n: p.grad for n, p in network.named_parameters() if p.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("family", "kinds"), [("dit", 2), ("uvit", 3)])
def test_blocks_compile_without_a_break(family, kinds):
    """The first one, which gives its values, those that take them, and those with a long skip."""
    network = make(family, **ALL)
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_blocks(network, backend=counter, fullgraph=True)
    with torch.no_grad():
        network(*batch())
        network(*batch())
    assert counter.frame_count == kinds


def test_amm_modulates_beside_them():
    network = make("dit", amm=[1, 3], **ALL).eval()
    x, t, y = batch()
    assert torch.equal(network(x, t, y, Route(EVERYONE)), patchify(network(x, t, y), 2))
    assert not torch.allclose(network(x, t, y), make("dit", **ALL).eval()(x, t, y), atol=1e-3)


def test_values_of_tokens_that_the_first_block_has_not_seen_are_refused():
    network = make("dit", value_residual=True)
    with pytest.raises(UsageError, match=r"model.value_residual mixes .* set mask.enter=1 or more"):
        network(*batch(), Route(KEEP, 0, 6, "own", "all"))
    model = dict(name=None, family="dit", **SIZES["dit"], value_residual=True)
    layers = {"mask": {"ratio": 0.5, "route": "tread", "enter": 0}, "model": model}
    with pytest.raises(UsageError, match=r"set mask.enter=1 or more"):
        road.resolve(configuration.build(layers))
    layers["mask"]["enter"] = 1
    road.resolve(configuration.build(layers))


def test_a_head_that_cannot_be_turned_is_said_so():
    model = dict(name=None, family="dit", **SIZES["dit"] | {"hidden_size": 12}, rope=True)
    with pytest.raises(
        UsageError, match=r"2 heads in a width of 12 have 6 each, which must divide"
    ):
        road.resolve(configuration.build({"model": model}))


def test_families_without_them_refuse_them_by_name():
    model = dict(name=None, family="mdt", **SIZES["mdt"], rope=True)
    with pytest.raises(UsageError, match=r"unknown configuration key 'model.rope' for family mdt"):
        road.resolve(configuration.build({"model": model}))


def test_what_they_cost_is_counted():
    def forward(**options):
        model = dict(name=None, family="dit", **SIZES["dit"] | {"hidden_size": 48}, **options)
        return cost.measure(road.resolve(configuration.build({"model": model})))

    plain, modern = forward(), forward(**ALL)
    assert modern.forward_flops == pytest.approx(plain.forward_flops, rel=0.01)
    # 7 shares, 8 times q and k norms of 24 channels
    extra = modern.parameters - plain.parameters - 7 - 8 * 48
    assert abs(extra) <= 8 * 64  # the SwiGLU's biases


@pytest.mark.parametrize(
    ("family", "route"),
    [("uvit", "visible"), ("uvit", "tread"), ("dit", "visible"), ("dit", "sprint")],
)
def test_trainings_with_them_resume_exactly(tmp_path, quiet, family, route):
    model = dict(name=None, family=family, num_classes="auto", **SIZES[family], **ALL)
    layers = {"model": model, "mask": {"route": route}, "optim": {"lr": 1e-2}}

    def steps(count, run):
        train(small(layers, {"train": {"steps": count}}), tmp_path / run, quiet)

    steps(5, "straight")
    steps(2, "resumed")
    steps(5, "resumed")
    assert_same_bits(tmp_path / "straight", tmp_path / "resumed")
    block = "blocks.1" if family == "dit" else "mid_block"
    learned = weights.read(tmp_path / "straight" / "weights.safetensors").tensors
    for name in ("value_share", "q_norm.weight"):
        tensor = learned[f"{block}.attn.{name}"]
        assert not torch.equal(tensor, torch.full_like(tensor, 0.5 if "share" in name else 1.0))


# ------------------------------------------------------------------ weights


def stored(tmp_path, **options):
    model = dict(name=None, family="dit", num_classes=3, **SIZES["dit"], **options)
    config = road.resolve(configuration.build({"model": model}))
    path = tmp_path / f"{'-'.join(options) or 'plain'}.safetensors"
    weights.save(path, copy.deepcopy(make("dit", **options).state_dict()), config)
    return path


def test_a_start_from_other_blocks_says_what_differs(tmp_path):
    network = make("dit", norm="rms", rope=True)
    report = warmstart.start_from(network, weights.read(stored(tmp_path)))
    assert report.share == 1  # neither has parameters in a DiT
    told = "made otherwise than there: model.norm rms, not layer; model.rope True, not False"
    assert any(told in line for line in report.lines())
    report = warmstart.start_from(make("dit"), weights.read(stored(tmp_path, mlp="swiglu")), True)
    assert any("model.mlp gelu, not swiglu" in line for line in report.lines())
    assert "blocks.0.mlp.fc1.weight" in report.missing


def test_weights_keep_their_own_blocks(tmp_path):
    path = stored(tmp_path, **ALL)
    x, t, y = batch()
    loaded = weights.load(path).backbone
    assert torch.equal(loaded(x, t, y), make("dit", **ALL).eval()(x, t, y))
    with pytest.raises(UsageError, match=r"model.rope False: .* says itself .* \(True\)"):
        weights.load(path, rope=False)


def test_no_published_layout_holds_them(tmp_path):
    found = weights.read(stored(tmp_path, rope=True))
    with pytest.raises(
        UsageError, match=r"--format dit cannot hold a network with model.rope=True"
    ):
        published.export(found.tensors, found.config.model, (3, 16, 16), "dit")
    assert backbones.network_class(found.config.model).__name__ == "DiT"
