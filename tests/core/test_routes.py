"""Routes of tokens: masked score matching, MDT's masked pass and TREAD are values of one thing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msmdiff.core import backbones
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.backbones.layers import gather_tokens, patchify, unpatchify
from msmdiff.core.backbones.routes import Route, Trunk
from msmdiff.core.diffusion import masking
from msmdiff.core.errors import UsageError
from msmdiff.core.sections import ModelConfig
from msmdiff.core.seeding import stream

SIZES = {
    "uvit": dict(patch_size=2, hidden_size=16, depth=9, num_heads=2),
    "dit": dict(patch_size=2, hidden_size=16, depth=8, num_heads=2),
    "mdt": dict(patch_size=2, hidden_size=16, depth=8, num_heads=2, decode_layers=2),
    "mdtv2": dict(patch_size=2, hidden_size=16, depth=10, num_heads=2, decode_layers=2),
}
SPARSE = {
    "mixer": dict(sparse="mixer", sparse_depth=1, sparse_width=8),
    "fusion": dict(sparse="fusion", sparse_depth=2),
    "decoder": dict(sparse="decoder", sparse_depth=2, sparse_width=8, sparse_heads=1),
}
KEEP = torch.tensor([[3, 9, 40, 63], [0, 1, 2, 50]])


def make(family, **part):
    model = ModelConfig(name=None, family=family, num_classes=3, **SIZES[family], **part)
    torch.manual_seed(0)
    network = backbones.build(backbones.resolve(model), (3, 16, 16))
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    return x, torch.tensor([3.0, 700.0]), torch.tensor([0, 2])


def tread(network, keep, enter=2):
    return Route(keep, enter, network.trunk.symmetric_leave(enter, 2), "own", "all")


@pytest.mark.parametrize("family", SIZES)
def test_a_route_that_hides_nobody_is_the_plain_pass_to_the_last_bit(family):
    network = make(family)
    x, t, y = batch()
    plain = network(x, t, y)
    assert torch.equal(network(x, t, y, None), plain)
    assert torch.equal(network(x, t, y, Route()), plain)
    assert torch.equal(network(x, t, y, Route(None, 2, 4, "own", "all")), plain)


@pytest.mark.parametrize("family", SIZES)
def test_tokens_that_all_take_the_route_come_back_in_their_places(family):
    network = make(family)
    x, t, y = batch()
    shuffled = torch.stack([torch.randperm(64), torch.randperm(64)])
    torch.testing.assert_close(
        network(x, t, y, tread(network, shuffled)), network(x, t, y), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("family", SIZES)
def test_hidden_tokens_keep_their_values_around_the_route(family):
    """With blocks on the route that do nothing, hidden or not makes no difference."""
    network = make(family)
    x, t, y = batch()
    route = tread(network, KEEP)
    blocks = (
        [block for block, _ in network.numbered_blocks()]
        if family != "uvit"
        else [*network.in_blocks, network.mid_block, *network.out_blocks]
    )
    for block in blocks[route.enter : route.leave]:
        for name, parameter in block.named_parameters():
            if name.startswith(("attn.proj", "mlp.fc2")):
                torch.nn.init.zeros_(parameter)
            elif name == "skip_linear.weight":  # the identity on what comes in, nothing of the skip
                half = parameter.shape[0]
                parameter.data = torch.cat([torch.eye(half), torch.zeros(half, half)], 1)
            elif name == "skip_linear.bias":
                torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(network(x, t, y, route), network(x, t, y), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SIZES)
def test_the_route_does_change_what_the_network_says_and_everything_gets_gradients(family):
    network = make(family).train()
    x, t, y = batch()
    routed = network(x, t, y, tread(network, KEEP))
    assert routed.shape == x.shape
    assert not torch.allclose(routed, network(x, t, y), atol=1e-3)
    routed.square().mean().backward()
    idle = {"mask_token"} | {n for n, _ in network.named_parameters() if n.startswith("side.")}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and name not in idle:
            assert parameter.grad is not None, name


@pytest.mark.parametrize("family", SIZES)
def test_work_falls_with_the_tokens_on_the_route(family):
    network = make(family)
    x, t, y = batch()
    counts = []
    for route in (None, tread(network, KEEP)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t, y, route)
        counts.append(counter.get_total_flops())
    depth, span = network.trunk.depth, tread(network, KEEP)
    outside = 1 - (span.leave - span.enter) / depth
    assert counts[1] < counts[0] * (outside + 0.25)


@pytest.mark.parametrize("family", ["uvit", "dit"])
def test_masked_score_matching_answers_with_the_kept_patches(family):
    network = make(family)
    x, t, y = batch()
    everyone = torch.stack([torch.randperm(64), torch.randperm(64)])
    full = patchify(network(x, t, y), 2)
    torch.testing.assert_close(
        network(x, t, y, Route(everyone)), gather_tokens(full, everyone), atol=1e-4, rtol=1e-4
    )
    assert network(x, t, y, Route(KEEP)).shape == (2, 4, 12)


def test_mdt_can_fill_gaps_with_the_mask_token_alone():
    network = make("mdtv2")
    x, t, y = batch()
    side, mask = (
        network(x, t, y, Route(KEEP, 0, network.encoder_depth, fill, "all"))
        for fill in ("side", "mask")
    )
    assert side.shape == mask.shape == x.shape
    assert not torch.allclose(side, mask, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "route", "words"),
    [
        ("dit", Route(KEEP, 2, 9, "own"), "from block 2 to 9 does not fit 8 blocks"),
        ("dit", Route(KEEP, 4, 4, "own"), "does not fit"),
        ("dit", Route(KEEP, 0, 5), "needs a filling of its gaps"),
        ("dit", Route(KEEP, 2, 6, "side"), "nothing to fill gaps with by 'side': use 'own'"),
        ("uvit", Route(KEEP, 2, 5, "own"), r"cuts the long skip .*: let it leave at 7"),
        ("mdtv2", Route(KEEP, 2, 8, "own"), r"cuts the long skip .*: let it leave at 6"),
        ("mdt", Route(KEEP, 0, 3, "side"), "leaves at 6 here"),
    ],
)
def test_a_route_that_does_not_suit_the_network_is_refused(family, route, words):
    network = make(family)
    with pytest.raises(UsageError, match=words):
        network(*batch(), route)


def test_special_tokens_travel_with_the_kept_ones():
    trunk = Trunk(3, {}, extras=2)
    tokens = torch.arange(2 * 5.0).view(1, 5, 2)
    seen = []

    def step(number, z, skip, ids):
        seen.append(z.shape[1])
        return z + 100 * (ids is not None)

    keep = torch.tensor([[2, 0]])
    out = trunk.run(
        tokens, Route(keep, 1, 2, "own"), step, lambda before, kept: trunk.own(before, kept, keep)
    )
    assert seen == [5, 4, 5]
    moved = torch.tensor([100.0, 100, 100, 0, 100])[None, :, None]
    assert torch.equal(out, tokens + moved)


@pytest.mark.parametrize(
    ("model", "route"),
    [
        (dict(name=None, family="dit", **SIZES["dit"]), "tread"),
        (dict(name=None, family="uvit", **SIZES["uvit"]), "tread"),
        (dict(name=None, family="mdt", **SIZES["mdt"]), "tread"),
        (dict(name=None, family="dit", **SIZES["dit"]), "visible"),
    ],
)
def test_an_objective_takes_the_route_that_is_named(model, route):
    layers = {"mask": {"ratio": 0.5, "route": route}, "model": model, "objective": {"name": "msm"}}
    config = road.resolve(configuration.build(layers))
    parts = road.build(config)
    (route_of,) = parts.objective.passes.values()
    drawn = route_of(3, lambda purpose, device="cpu": stream(device, 0, purpose))
    assert drawn.keep.shape == (3, 32)
    assert (drawn.fill, drawn.scored) == (("own", "all") if route == "tread" else ("none", "kept"))
    terms = parts.objective(
        parts.backbone,
        torch.randn(3, 3, 16, 16),
        None,
        lambda purpose, device="cpu": stream(device, 0, purpose),
    )
    assert terms["mask_ratio"] == 0.5
    assert torch.isfinite(terms["loss"])


def test_a_family_without_the_filling_refuses_the_objective():
    layers = {"mask": {"ratio": 0.5, "route": "side"}, "objective": {"name": "msm"}}
    with pytest.raises(UsageError, match=r"mask.route side is not for model.family uvit"):
        road.resolve(configuration.build(layers))


def test_a_network_too_shallow_for_the_route_is_said_so():
    model = dict(name=None, family="dit", **{**SIZES["dit"], "depth": 4})
    layers = {"mask": {"ratio": 0.5, "route": "tread"}, "model": model}
    with pytest.raises(UsageError, match=r"mask.enter 2 and mask.leave 4 leave no block between"):
        road.resolve(configuration.build(layers))


def sparse_route(part, network, keep, dropped=False):
    if part == "mixer":
        return Route(keep)
    enter, leave = network.trunk.meets
    return Route(keep, enter, leave, "mask", "all", dropped)


@pytest.mark.parametrize("family", ["uvit", "dit"])
@pytest.mark.parametrize("part", SPARSE)
def test_sparse_parts_put_every_token_back(family, part):
    """Whoever keeps all, in any order, gets the unmasked pass."""
    network = make(family, **SPARSE[part])
    x, t, y = batch()
    plain = network(x, t, y)
    everyone = torch.stack([torch.randperm(64), torch.randperm(64)])
    routed = network(x, t, y, sparse_route(part, network, everyone))
    if part == "mixer":
        plain = gather_tokens(patchify(plain, 2), everyone)
    torch.testing.assert_close(routed, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["uvit", "dit"])
@pytest.mark.parametrize("part", SPARSE)
def test_sparse_parts_learn_and_cost_less(family, part):
    network = make(family, **SPARSE[part]).train()
    x, t, y = batch()
    route = sparse_route(part, network, KEEP)
    counts = []
    for way in (None, route):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t, y, way)
        counts.append(counter.get_total_flops())
    assert counts[1] < 0.75 * counts[0]
    network(x, t, y, route).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("family", ["uvit", "dit"])
def test_kept_tokens_hear_of_hidden_ones_through_the_mixer(family):
    x, t, y = batch()
    changed = x.clone()
    changed[:, :, 4:6, 4:6] += 1  # token 18 of 8 x 8, which nobody keeps
    for part, hears in ((None, False), ("mixer", True)):
        network = make(family, **SPARSE.get(part, {}))
        with torch.no_grad():
            one, other = network(x, t, y, Route(KEEP)), network(changed, t, y, Route(KEEP))
        assert torch.equal(one, other) is not hears


@pytest.mark.parametrize("family", ["uvit", "dit"])
def test_a_dropped_path_is_the_one_of_mask_tokens_and_costs_no_middle(family):
    network = make(family, **SPARSE["fusion"])
    x, t, y = batch()
    one = torch.tensor([True, False])
    dropped = network(x, t, y, sparse_route("fusion", network, None, True))
    mixed = network(x, t, y, sparse_route("fusion", network, None, one))
    torch.testing.assert_close(mixed[0], dropped[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1], network(x, t, y)[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(dropped[1], mixed[1], atol=1e-3)


@pytest.mark.parametrize(
    ("part", "route", "words"),
    [
        ("fusion", Route(KEEP), "takes its tokens together from block 2"),
        ("decoder", Route(KEEP, 2, 6, "own"), "takes its tokens together from block 0"),
        ("mixer", Route(None, dropped=True), "can do without its middle"),
    ],
)
def test_a_route_that_does_not_suit_the_sparse_part_is_refused(part, route, words):
    with pytest.raises(UsageError, match=words):
        make("dit", **SPARSE[part])(*batch(), route)


def routed_objective(route, family="dit", **layers):
    model = dict(name=None, family=family, num_classes=3, **SIZES[family])
    layers = {"mask": {"ratio": 0.75, "route": route}, "model": model, **layers}
    config = road.resolve(configuration.build(layers))
    return config, road.build(config)


def draws(position=0):
    return lambda purpose, device="cpu": stream(device, 0, purpose, position)


@pytest.mark.parametrize("family", ["uvit", "dit"])
@pytest.mark.parametrize(
    ("route", "part", "objective"),
    [
        ("sprint", "fusion", "msm"),
        ("maskdit", "decoder", "maskdit"),
        ("deferred", "mixer", "msm"),
        ("separate", "none", "msm"),
    ],
)
def test_a_route_brings_the_part_and_the_objective_that_it_needs(family, route, part, objective):
    config, parts = routed_objective(route, family)
    assert (config.model.sparse, config.objective.name) == (part, objective)
    x0, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    terms = parts.objective(parts.backbone, x0, y, draws())
    assert terms["mask_ratio"] == 0.75
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"])


def test_another_family_or_part_is_refused_by_name():
    with pytest.raises(UsageError, match=r"mask.route sprint is not for model.family mdt"):
        routed_objective("sprint", "mdt", objective={"name": "msm"})
    model = dict(name=None, family="dit", **SIZES["dit"], sparse="mixer")
    with pytest.raises(UsageError, match=r"mask.route sprint needs model.sparse fusion, not mixer"):
        routed_objective("sprint", model=model)


def test_disjoint_masks_cover_the_image_once():
    _, parts = routed_objective("separate")
    assert parts.objective.copies == 4
    (route_of,) = parts.objective.passes.values()
    keep = route_of(12, draws()).keep.view(3, 64)
    assert torch.equal(keep.sort(dim=1).values, torch.arange(64).expand(3, 64))
    assert route_of(3, draws()).keep.shape == (3, 16)  # pictures ask for fewer than an image's


def test_too_many_groups_are_refused():
    with pytest.raises(UsageError, match=r"mask.groups 5 of 16 tokens each .* at most 4"):
        routed_objective("separate", mask={"ratio": 0.75, "route": "separate", "groups": 5})


def test_a_cell_mask_keeps_as_many_of_every_cell():
    mask = masking.CellMask((8, 8), 0.75)
    keep = mask.draw(5, stream("cpu", 0, "mask"))
    assert keep.shape == (5, 16)
    rows, columns = keep // 8, keep % 8
    cells = rows // 2 * 4 + columns // 2
    assert torch.equal(cells.sort(dim=1).values, torch.arange(16).expand(5, 16))
    assert len({tuple(row.tolist()) for row in keep}) == 5
    with pytest.raises(UsageError, match=r"mask.cell 3 does not divide the 8x8 .* \[1, 2, 4, 8\]"):
        masking.CellMask((8, 8), 0.75, cell=3)


def test_maskdit_adds_the_reconstruction_of_hidden_patches():
    """Where the network is exact, and x0 is told as the normalised noisy image, nothing is left."""
    _, parts = routed_objective("maskdit", process={"prediction": "x0"})
    x0, eps = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    t = torch.tensor([0.3, 0.6])
    seen = {}

    def told(x, time, y=None, route=None):
        patches = patchify(x, 2)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        seen["x"] = (patches - mean) / (variance + 1e-6).sqrt()
        hidden = torch.ones(2, 64, 1).scatter(1, route.keep[..., None], 0.0)
        # right on kept patches; on hidden ones off by exactly 2
        out = torch.where(hidden.bool(), seen["x"] + 2, patchify(x0, 2))
        return unpatchify(out, 2, (8, 8))

    route = Route(KEEP, 0, None, "mask", "kept")
    terms = parts.objective.terms(told, x0, eps, t, None, route)
    torch.testing.assert_close(terms["reconstruction"], torch.full((2,), 0.4))
    torch.testing.assert_close(terms["loss"], torch.full((2,), 0.4))
