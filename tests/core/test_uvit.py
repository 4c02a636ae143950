import pytest
import torch

from msmdiff.core import backbones
from msmdiff.core.backbones.layers import gather_tokens, patchify, timestep_embedding, unpatchify
from msmdiff.core.backbones.routes import Route
from msmdiff.core.backbones.uvit import UViT
from msmdiff.core.errors import UsageError
from msmdiff.core.sections import ModelConfig


def network(num_classes=0, **fields):
    torch.manual_seed(0)
    fields = dict(patch_size=2, hidden_size=16, depth=4, num_heads=2) | fields
    net = UViT((3, 8, 12), num_classes, **fields)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize(
    "fields", [dict(), dict(final_conv=True), dict(skip=False, qkv_bias=True, mlp_time_embed=True)]
)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_keeping_every_token_is_the_full_pass(fields, num_classes):
    net = network(num_classes, **fields)
    x, t, y = torch.randn(3, 3, 8, 12), torch.tensor([0.0, 5.0, 999.0]), torch.tensor([0, 3, 5])
    keep = torch.stack([torch.randperm(24) for _ in range(3)])
    full = patchify(net(x, t, y), 2)
    assert torch.allclose(net(x, t, y, Route(keep)), gather_tokens(full, keep), atol=1e-5)


@pytest.mark.parametrize("final_conv", [False, True])
def test_hidden_pixels_have_no_influence(final_conv):
    net, keep = network(final_conv=final_conv), torch.tensor([[1, 7, 20], [0, 5, 23]])
    x = torch.randn(2, 3, 8, 12, requires_grad=True)
    net(x, torch.tensor([3.0, 4.0]), None, Route(keep)).square().sum().backward()
    touched = patchify(x.grad, 2).abs().sum(-1) > 0
    assert torch.equal(touched, torch.zeros(2, 24, dtype=torch.bool).scatter(1, keep, True))


def test_patches_are_ordered_row_column_channel():
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    # token 1 is row 0, columns 2-3; inside it: row, then column, then channel
    expected = [x[0, c, r, 2 + q].item() for r in range(2) for q in range(2) for c in range(3)]
    assert tokens[0, 1].tolist() == expected
    assert torch.equal(unpatchify(tokens, 2, (2, 3)), x)


def test_time_embedding_starts_with_cosines():
    e = timestep_embedding(torch.tensor([0.0, 1.0]), 7)
    assert torch.equal(e[0], torch.tensor([1.0, 1, 1, 0, 0, 0, 0]))
    assert e[1, 0] == pytest.approx(0.5403023)
    assert e[1, 3] == pytest.approx(0.8414710)


def test_no_label_is_the_null_class():
    net, x, t = network(5), torch.randn(2, 3, 8, 12), torch.tensor([3.0, 4.0])
    assert torch.equal(net(x, t), net(x, t, torch.tensor([5, 5])))
    assert not torch.equal(net(x, t), net(x, t, torch.tensor([1, 5])))


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        net = network(5)
        net.gradient_checkpointing = checkpointing
        net(torch.ones(2, 3, 8, 12), torch.tensor([3.0, 4.0])).square().sum().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_bf16_attention_is_close_to_fp32():
    net, x, t = network(), torch.randn(2, 3, 8, 12), torch.tensor([3.0, 4.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x, t)
    full = net(x, t)
    assert (low.float() - full).norm() / full.norm() < 0.03


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "parameters"),
    [
        ("MaskDM-S/4", (3, 64, 64), 0, 44_292_144),
        ("MaskDM-S/4", (3, 256, 256), 0, 46_258_224),
        ("MaskDM-B/4", (3, 256, 256), 0, 102_417_456),
        ("U-ViT-S/2", (3, 32, 32), 0, 44_255_328),
        ("U-ViT-S/4", (3, 64, 64), 0, 44_292_228),
        ("U-ViT-L/2", (4, 32, 32), 1000, 286_763_172),
        ("U-ViT-H/2", (4, 32, 32), 1000, 500_832_016),
        ("U-ViT-L/4", (4, 64, 64), 1000, 286_861_524),
        ("U-ViT-H/4", (4, 64, 64), 1000, 500_942_656),
    ],
)
def test_published_parameter_counts(name, shape, num_classes, parameters):
    config = backbones.resolve(ModelConfig(name=name, num_classes=num_classes))
    with torch.device("meta"):
        net = backbones.build(config, shape)
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_unknown_size_names_the_nearest():
    with pytest.raises(
        UsageError, match=r"'MaskDM-S4' is not a known size; did you mean 'MaskDM-S/4'"
    ):
        backbones.resolve(ModelConfig(name="MaskDM-S4"))
