"""Opening published checkpoints: layouts, what shapes tell, and files that must not be opened."""

import argparse
import os

import pytest
import torch
from safetensors.torch import save_file

from msmdiff.core import backbones
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
