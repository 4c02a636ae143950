"""What every backbone promises: masks, gradients, conditions, AMM, and refusals, on networks of a
few numbers.
"""

import pytest
import torch

from msmdiff.core import backbones
from msmdiff.core.backbones.edt import TokenMasks
from msmdiff.core.backbones.layers import gather_tokens, patchify
from msmdiff.core.backbones.maskdwt import PairRoute
from msmdiff.core.backbones.routes import Route, checkpoint_blocks
from msmdiff.core.condition import Classes
from msmdiff.core.config import section
from msmdiff.core.diffusion import process
from msmdiff.core.diffusion.objectives import Objective
from msmdiff.core.errors import UsageError
from msmdiff.core.sections import ModelConfig

SHAPE = (4, 16, 16)
STAGES = dict(
    stage_widths=[16, 24, 32, 24, 16], stage_depths=[1, 1, 1, 1, 1], stage_heads=[2, 2, 2, 2, 2]
)
SMALL = {
    "uvit": dict(patch_size=2, hidden_size=16, depth=3, num_heads=2),
    "maskdwt": dict(patch_size=2, hidden_size=16, depth=3, num_heads=2),
    "dit": dict(patch_size=2, hidden_size=16, depth=2, num_heads=2),
    "mdt": dict(patch_size=2, hidden_size=16, depth=3, num_heads=2, decode_layers=1),
    "mdtv2": dict(patch_size=2, hidden_size=16, depth=4, num_heads=2, decode_layers=2),
    "edt": dict(patch_size=2, hidden_size=16, **STAGES),
}
DROPPING = ("uvit", "maskdwt", "dit")
ADALN = ("dit", "mdt", "mdtv2", "edt")


def make(family, num_classes=3, **fields):
    """A network whose every parameter matters: the published starts are zero in places."""
    model = backbones.resolve(
        ModelConfig(name=None, family=family, num_classes=num_classes, **(SMALL[family] | fields))
    )
    torch.manual_seed(0)
    network = backbones.build(model, SHAPE)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def batch(n=2):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(n, *SHAPE, generator=generator),
        torch.tensor([3.0, 700.0])[:n],
        torch.tensor([0, 2])[:n],
    )


@pytest.mark.parametrize("family", DROPPING)
def test_all_tokens_kept_equals_the_full_forward(family):
    network = make(family).eval()
    x, t, y = batch()
    keep = torch.stack([torch.randperm(64), torch.randperm(64)])
    full = patchify(network(x, t, y), 2)
    torch.testing.assert_close(
        network(x, t, y, Route(keep)), gather_tokens(full, keep), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("family", "fields"),
    [("uvit", {}), ("maskdwt", {}), ("dit", {}), ("dit", {"learn_sigma": True})],
)
def test_hidden_pixels_do_not_influence_the_masked_loss(family, fields):
    network = make(family, **fields)
    x, _, y = batch()
    keep = torch.tensor([[0, 5, 9, 63], [1, 2, 40, 41]])
    noise = process.build(section("process"))
    x.requires_grad_()
    objective = Objective(noise, None, {}, section("objective"), patch_size=2, condition=Classes(3))
    times = torch.tensor([0.1, 0.8])
    terms = objective.terms(network, x, torch.randn_like(x), times, y, Route(keep))
    terms["loss"].mean().backward()
    touched = patchify(x.grad, 2).abs().sum(-1) > 0
    assert torch.equal(touched, torch.zeros(2, 64, dtype=torch.bool).scatter(1, keep, True))


@pytest.mark.parametrize("family", ["mdt", "mdtv2"])
def test_mdt_keeps_the_image_and_fills_hidden_tokens_by_the_side_block(family):
    network = make(family).eval()
    x, t, y = batch()

    def side(keep):
        return Route(keep, 0, network.encoder_depth, "side", "all")

    everyone = side(torch.randperm(64).expand(2, -1))
    assert torch.allclose(network(x, t, y, everyone), network(x, t, y), atol=1e-4)
    keep = torch.tensor([[7, 3, 20], [1, 2, 40]])
    masked = network(x, t, y, side(keep))
    assert masked.shape == x.shape
    # The order of the ids is free.
    assert torch.allclose(network(x, t, y, side(keep.flip(1))), masked, atol=1e-5)
    torch.nn.init.zeros_(network.side[0].modulation.weight)
    torch.nn.init.zeros_(network.side[0].modulation.bias)
    assert not torch.allclose(network(x, t, y, side(keep)), masked, atol=1e-3)


def test_edt_masks_change_the_coarse_stages_only_where_they_hide():
    network = make("edt").eval()
    x, t, y = batch()
    none = (torch.zeros(2, 64, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool))
    nothing = TokenMasks(down=none)
    assert torch.equal(network(x, t, y, nothing), network(x, t, y))
    drawn = network.draw_masks(2, torch.Generator().manual_seed(0))
    assert drawn.mid is None
    assert [tuple(mask.shape) for mask in drawn.down] == [(2, 64), (2, 16)]
    assert not torch.equal(network(x, t, y, drawn), network(x, t, y))
    with pytest.raises(UsageError, match="cannot drop tokens"):
        network(x, t, y, Route(torch.zeros(2, 3, dtype=torch.long)))


def test_edt_draws_masks_in_the_published_ranges():
    network = make("edt", stage_depths=[5, 1, 1, 1, 1], mid_mask=True)
    masks = network.draw_masks(4000, torch.Generator().manual_seed(0))
    shares = [mask.float().mean().item() for mask in (masks.mid, *masks.down)]
    assert 0.14 < shares[0] < 0.26
    assert 0.39 < shares[1] < 0.51
    assert 0.09 < shares[2] < 0.21


@pytest.mark.parametrize("family", SMALL)
def test_no_label_is_the_null_class_and_unconditional_networks_take_none(family):
    x, t, _ = batch()
    network = make(family).eval()
    assert torch.equal(network(x, t), network(x, t, torch.tensor([3, 3])))
    assert make(family, num_classes=0)(x, t).shape == x.shape


@pytest.mark.parametrize("family", ADALN)
def test_a_learned_variance_doubles_the_channels(family):
    x, t, y = batch()
    assert make(family, learn_sigma=True)(x, t, y).shape == (2, 8, 16, 16)


@pytest.mark.parametrize("family", SMALL)
def test_gradient_checkpointing_changes_nothing(family):
    x, t, y = batch()
    grads = []
    for every in (0, 1, 2):
        network = make(family)
        checkpoint_blocks(network, every)
        network(x, t, y).square().mean().backward()
        grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for again in grads[1:]:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0], again, strict=True))


@pytest.mark.parametrize("family", ADALN)
def test_adaln_networks_start_as_published(family):
    model = backbones.resolve(ModelConfig(name=None, family=family, num_classes=3, **SMALL[family]))
    network = backbones.build(model, SHAPE)
    x, t, y = batch()
    assert network(x, t, y).abs().max() == 0
    assert all(block.modulation.weight.abs().max() == 0 for block, _ in network.numbered_blocks())


@pytest.mark.parametrize("family", ADALN)
def test_amm_acts_in_evaluation_only_where_it_is_named(family):
    network = make(family)
    x, t, y = batch()
    plain = network.eval()(x, t, y)
    network.set_amm([1])
    assert [block.attn.factor is not None for block, _ in network.numbered_blocks()][:3] in (
        [False, True],
        [False, True, False],
    )
    assert not torch.allclose(network(x, t, y), plain)
    assert torch.equal(network.train()(x, t, y), plain)
    network.set_amm("off")
    assert torch.equal(network.eval()(x, t, y), plain)
    assert not any("factor" in name for name in network.state_dict())


def test_amm_default_follows_depth_and_guidance():
    network = make("edt", stage_depths=[2, 2, 2, 3, 3], amm="default")

    def active():
        return [
            i
            for i, (block, _) in enumerate(network.numbered_blocks())
            if block.attn.factor is not None
        ]

    assert active() == [7, 10]
    network.set_amm("default", cfg_scale=4.0)
    assert active() == [8]
    with pytest.raises(UsageError, match="published for 12 and 28 blocks"):
        make("edt", amm="default")
    with pytest.raises(UsageError, match="names block 9"):
        make("dit", amm=[9])


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("dit", dict(hidden_size=18), "must divide by 4"),
        ("dit", dict(patch_size=3), "does not divide the 16x16 input"),
        ("mdt", dict(decode_layers=9), "between 0 and model.depth"),
        ("edt", dict(stage_widths=[16, 24]), "five numbers"),
        ("edt", dict(stage_widths=[16, 24, 32, 24, 24]), "read the same backwards"),
        ("edt", dict(patch_size=8), "must divide by 4"),
        ("edt", dict(mid_mask=True), "more than 4 blocks"),
        ("uvit", dict(context_tokens=4), "has no labels"),
        ("dit", dict(colour=1), "unknown configuration key 'model.colour'"),
    ],
)
def test_a_mistake_is_one_sentence(family, fields, message):
    with pytest.raises(UsageError, match=message):
        make(family, **fields)


def test_text_takes_the_place_of_labels():
    network = make("uvit", num_classes=0, context_tokens=5, context_width=8).eval()
    x, t, _ = batch()
    keep = torch.arange(64).expand(2, -1)
    text = torch.randn(2, 5, 8)
    torch.testing.assert_close(
        network(x, t, text, Route(keep)), patchify(network(x, t, text), 2), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(UsageError, match="draws from text"):
        network(x, t)


def test_a_network_without_null_class_asks_for_labels():
    network = make("uvit", null_class=False)
    assert network.label_emb.num_embeddings == 3
    with pytest.raises(UsageError, match="no null class"):
        network(*batch()[:2])


def test_wavelet_groups_can_be_masked_apart():
    network = make("maskdwt", num_classes=0, detail_scale=2).eval()
    x, t, _ = batch()
    everyone, some = torch.arange(64)[None].expand(2, -1), torch.tensor([[0, 15], [3, 4]])
    approx, detail = network(x, t, None, PairRoute(everyone, detail=some))
    assert approx.shape == (2, 64, 12)
    assert detail.shape == (2, 2, 16)
    with pytest.raises(UsageError, match="one mask cannot hide both"):
        network(x, t, None, Route(everyone))
