"""Opening published checkpoints: layouts, what shapes tell, and files that must not be opened."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

from msmdiff.core import backbones, sections, weights
from msmdiff.core.diffusion import process
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import ModelConfig
from msmdiff.core.weights import published

SHAPE = (4, 8, 8)
STAGES = dict(
    stage_widths=[16, 24, 32, 24, 16], stage_depths=[1, 2, 1, 1, 1], stage_heads=[2, 2, 4, 2, 2]
)
MODELS = {
    "dit": ("dit", dict(patch_size=2, hidden_size=16, depth=2, num_heads=2, learn_sigma=True)),
    "mdt": ("mdt", dict(patch_size=2, hidden_size=16, depth=3, num_heads=2, decode_layers=2)),
    "mdtv2": (
        "mdt",
        dict(patch_size=2, hidden_size=16, depth=4, num_heads=2, decode_layers=2, mlp_ratio=2.0),
    ),
    "edt": ("edt", dict(patch_size=2, hidden_size=16, **STAGES)),
    "uvit": ("uvit", dict(patch_size=2, hidden_size=16, depth=3, num_heads=2, final_conv=True)),
    "maskdwt": ("maskdm", dict(patch_size=2, hidden_size=16, depth=3, num_heads=2, detail_scale=2)),
}


def model_of(family, num_classes=3):
    layout, fields = MODELS[family]
    model = backbones.resolve(
        ModelConfig(name=None, family=family, num_classes=num_classes, **fields)
    )
    network = backbones.build(model, SHAPE)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    return layout, model, network


def exported(family):
    layout, model, network = model_of(family)
    return published.export(network.state_dict(), model, SHAPE, layout)


@pytest.mark.parametrize("family", MODELS)
def test_an_exported_network_reads_back_the_same(family, tmp_path):
    layout, model, network = model_of(family)
    path = tmp_path / "weights.pt"
    torch.save(published.export(network.state_dict(), model, SHAPE, layout), path)
    read = published.read(path, {"num_heads": 2} if family in ("dit", "uvit", "maskdwt") else {})
    assert (read.notes["layout"], read.shape) == (layout, SHAPE)
    wanted, got = model.model_dump(), read.model.model_dump()
    assert {k: v for k, v in got.items() if k != "amm"} == {
        k: v for k, v in wanted.items() if k != "amm"
    }
    rebuilt = read.build().state_dict()
    assert all(torch.equal(rebuilt[name], tensor) for name, tensor in network.state_dict().items())


def test_the_average_is_taken_unless_refused(tmp_path):
    state = exported("dit")
    average = {name: tensor + 1 for name, tensor in state.items()}
    content = {
        "model": state,
        "ema": average,
        "opt": {"state": {}},
        "args": argparse.Namespace(model="DiT-XL/2"),
    }
    torch.save(content, tmp_path / "0000100.pt")
    bias = published.read(tmp_path / "0000100.pt", {"num_heads": 2}).tensors["patch_embed.bias"]
    assert torch.equal(bias, average["x_embedder.proj.bias"])
    last = published.read(tmp_path / "0000100.pt", {"num_heads": 2}, average=False)
    assert torch.equal(last.tensors["patch_embed.bias"], state["x_embedder.proj.bias"])
    assert last.notes["weights"] == "model"


def test_uvits_folder_and_safetensors_are_read(tmp_path):
    state = {name: tensor.contiguous() for name, tensor in exported("uvit").items()}
    folder = tmp_path / "500.ckpt"
    folder.mkdir()
    torch.save(state, folder / "nnet.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for path in (folder, tmp_path / "weights.safetensors"):
        assert published.read(path, {"num_heads": 2}).model.family == "uvit"
    with pytest.raises(MsmdiffError, match=r"folder without nnet_ema\.pth or nnet\.pth"):
        published.read(tmp_path)


def test_heads_are_asked_for_by_name(tmp_path):
    torch.save(exported("dit"), tmp_path / "dit.pt")
    with pytest.raises(
        UsageError, match=r"dit.pt: the number of attention heads .* --set model.num_heads="
    ):
        published.read(tmp_path / "dit.pt")
    with pytest.raises(UsageError, match="must divide by 4"):
        published.read(tmp_path / "dit.pt", {"num_heads": 5})


def test_a_forced_family_must_fit(tmp_path):
    torch.save(exported("mdt"), tmp_path / "mdt.pt")
    with pytest.raises(UsageError, match="is a mdt checkpoint, not dit"):
        published.read(tmp_path / "mdt.pt", family="dit")
    with pytest.raises(UsageError, match="the families are auto"):
        published.read(tmp_path / "mdt.pt", family="dot")


def test_missing_unknown_and_misshaped_tensors_are_named(tmp_path):
    state = exported("dit")
    path = tmp_path / "dit.pt"
    for change, message in (
        ({"blocks.0.attn.proj.bias": None}, "lacks the tensor blocks.0.attn.proj.bias"),
        ({"x_embedder.proj.weight": None}, "is no checkpoint of"),
        ({"pos_embed": None}, "lacks the tensor 'pos_embed'"),
        ({"extra.weight": torch.zeros(1)}, "has an unknown tensor extra.weight"),
        ({"blocks.0.attn.proj.bias": torch.zeros(3)}, r"of shape \[3\], not \[16\]"),
        (
            {"x_embedder.proj.weight": torch.zeros(16, 16)},
            "looks like a dit checkpoint, but its tensors have other shapes",
        ),
        ({"pos_embed": torch.zeros(1, 15, 16)}, "15 patch tokens, which is not a square grid"),
    ):
        torch.save({n: t for n, t in (state | change).items() if t is not None}, path)
        with pytest.raises(MsmdiffError, match=message):
            published.read(path, {"num_heads": 2})


class Trap:
    """Unpickling this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, zipped):
    path, proof = tmp_path / "trap.pt", tmp_path / "ran"
    torch.save({"model": Trap(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(MsmdiffError, match=r"asks to run code .*mkdir.*nothing was executed"):
        published.read(path)
    assert not proof.exists()


def test_files_that_are_no_checkpoint(tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(exported("dit"), whole)
    contents = {
        "page.pt": (b"\n<!DOCTYPE html><html>", "is a web page"),
        "cut.pt": (whole.read_bytes()[:3000], "not a checkpoint of torch's that can be read"),
        "empty.pt": (b"", "not a checkpoint of torch's that can be read"),
        "noise.pt": (b"\x00\x01\x02 not a checkpoint", "not a checkpoint of torch's"),
        "cut.safetensors": (
            b"\x10\x00\x00\x00\x00\x00\x00\x00{",
            "not a safetensors file that can",
        ),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MsmdiffError, match=message) as caught:
            published.read(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(MsmdiffError, match="does not exist"):
        published.read(tmp_path / "none.pt")
    torch.save([1, 2], whole)
    with pytest.raises(MsmdiffError, match="holds no tensors"):
        published.read(whole)


def test_what_a_layout_cannot_hold_is_refused():
    _, model, network = model_of("uvit")
    with pytest.raises(UsageError, match=r"cannot hold a network with model\.final_conv=True"):
        published.export(network.state_dict(), model, SHAPE, "maskdm")
    with pytest.raises(UsageError, match=r"cannot hold a network with model\.family uvit"):
        published.export(network.state_dict(), model, SHAPE, "dit")
    with pytest.raises(UsageError, match="the published layouts are"):
        published.export(network.state_dict(), model, SHAPE, "ditt")


@pytest.mark.parametrize(
    ("wrap", "which", "times"),
    [
        (lambda state, average: {"model": state, "model_ema": average}, "model_ema", 2),
        (lambda state, average: {"model": state, "model_ema": {"module": average}}, "model_ema", 2),
        (lambda state, average: {"model": state, "ema": {}}, "model", 1),
        (lambda state, average: {"model_state_dict": state}, "model_state_dict", 1),
        (lambda state, average: {"state_dict": prefixed("model.", state)}, "state_dict", 1),
        (lambda state, average: {"model": prefixed("_orig_mod.", state)}, "model", 1),
        (lambda state, average: {"model": prefixed("module._orig_mod.", state)}, "model", 1),
        (lambda state, average: {"model": prefixed("_orig_mod.module.", state)}, "model", 1),
        (
            lambda state, average: {
                "model": {
                    k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in state.items()
                }
            },
            "model",
            1,
        ),
    ],
)
def test_every_usual_container_opens(tmp_path, wrap, which, times):
    state = exported("dit")
    average = {name: 2 * tensor for name, tensor in state.items()}
    torch.save(wrap(state, average), tmp_path / "c.pt")
    read = published.read(tmp_path / "c.pt", {"num_heads": 2})
    bias = state["x_embedder.proj.bias"]
    assert torch.equal(read.tensors["patch_embed.bias"], times * bias)
    assert read.notes["weights"] == which


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


SIT = {"path_type": "Linear", "prediction": "velocity", "model": "SiT-XL/2"}


@pytest.mark.parametrize(
    ("name", "told", "family", "layout"),
    [
        ("w.pt", SIT, "auto", "sit"),
        ("w.pt", {"model": "SiT-B/4"}, "auto", "sit"),
        ("SiT-XL-2-256x256.pt", {}, "auto", "sit"),
        ("w.pt", {}, "sit", "sit"),
        ("w.pt", {}, "auto", "dit"),
        ("position.pt", {"model": "DiT-XL/2"}, "auto", "dit"),
        ("sit.pt", {}, "dit", "dit"),
    ],
)
def test_sit_is_told_from_dit_by_its_arguments_or_its_name(tmp_path, name, told, family, layout):
    content = {"ema": exported("dit"), "args": argparse.Namespace(**told)}
    torch.save(content, tmp_path / name)
    read = published.read(tmp_path / name, {"num_heads": 2}, family=family)
    assert read.notes["layout"] == layout
    schedule = read.sections["process"]["schedule"]
    assert schedule == ("flow" if layout == "sit" else "linear")


@pytest.mark.parametrize("change", [{"path_type": "GVP"}, {"prediction": "score"}])
def test_sit_with_another_path_or_prediction_is_refused(tmp_path, change):
    content = {"ema": exported("dit"), "args": argparse.Namespace(**SIT | change)}
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"w\.pt: SiT with .* is not read, only with"):
        published.read(tmp_path / "w.pt", {"num_heads": 2})


def test_sits_network_gives_the_velocity_of_its_own_clock(tmp_path):
    """SiT calls the image's end 1, and its velocity is x0 - eps there."""
    torch.save(exported("dit"), tmp_path / "sit.pt")
    model = weights.load(tmp_path / "sit.pt", num_heads=2)
    torch.save(exported_of(model), tmp_path / "back-sit.pt")
    x, t = torch.randn(2, *SHAPE), torch.tensor([0.25, 0.75])
    estimate = model.process.split(model.process.feed(model.backbone, x, t), x, t)
    velocity = model.backbone(x, 1 - t)
    assert velocity.shape == x.shape
    at = t.view(2, 1, 1, 1)
    torch.testing.assert_close(estimate.x0 - estimate.eps, velocity, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((1 - at) * estimate.x0 + at * estimate.eps, x, rtol=1e-4, atol=1e-4)
    target = model.process.target(estimate.x0, estimate.eps, t)
    torch.testing.assert_close(target, velocity, rtol=1e-4, atol=1e-4)

    # The channels that SiT throws away come back as zeros, and the network is the same.
    again = weights.load(tmp_path / "back-sit.pt", num_heads=2)
    assert torch.equal(again.backbone(x, t), model.backbone(x, t))
    with pytest.raises(UsageError, match="--format sit holds networks with"):
        published.file_content({}, process.build(sections.ProcessConfig()), "sit")


def exported_of(model):
    config = model.config.model
    state = published.export(model.backbone.state_dict(), config, SHAPE, "sit")
    assert state["final_layer.linear.weight"].shape == (2 * 2 * 2 * 4, 16)
    return published.file_content(state, model.process, "sit")


def test_numbers_that_are_not_finite_empty_or_shared_are_refused(tmp_path):
    state, path = exported("dit"), tmp_path / "dit.pt"
    name = "blocks.1.attn.proj.bias"
    spoilt = state[name].clone()
    spoilt[3] = float("nan")
    for change, message in (
        ({name: spoilt}, f"not finite \\(in {name}\\)"),
        ({name: torch.zeros(10**9, 0)}, f"{name} of shape .* is empty"),
        ({name: torch.zeros(16, dtype=torch.int64)}, "in torch.int64, which is not torch.float32"),
        (dict.fromkeys(prefixed("", state), torch.zeros(10**5)), "more numbers than it holds"),
    ):
        torch.save(state | change, path)
        with pytest.raises(MsmdiffError, match=message):
            published.read(path, {"num_heads": 2})


@pytest.mark.parametrize("family", ["dit", "uvit"])
def test_other_channel_counts_are_latents_of_an_autoencoder_that_is_not_known(tmp_path, family):
    fields = MODELS[family][1]
    for channels, codec in ((3, "pixel"), (4, "vae"), (16, "vae")):
        model = backbones.resolve(ModelConfig(name=None, family=family, num_classes=3, **fields))
        network = backbones.build(model, (channels, 8, 8))
        state = published.export(network.state_dict(), model, (channels, 8, 8), family)
        torch.save(state, tmp_path / "w.pt")
        stored = weights.read(tmp_path / "w.pt", {"num_heads": 2})
        assert stored.config.codec.name == codec
        assert getattr(stored.config.codec, "channels", 3) == channels
        assert stored.config.data.image_size == (8 if codec == "pixel" else 64)
