import pytest
import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import weights
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.training import warmstart

SMALL = {"model": {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3}}


def resolved(*layers):
    return road.resolve(configuration.build(SMALL, *layers))


def network(config, seed=0):
    torch.manual_seed(seed)
    net = road.build(config).backbone
    for p in net.parameters():
        torch.nn.init.normal_(p)
    return net


def stored(tmp_path, *layers):
    config = resolved(*layers)
    weights.save(tmp_path / "w.safetensors", network(config).state_dict(), config, images_seen=5)
    return weights.read(tmp_path / "w.safetensors")


def test_the_same_network_is_loaded_whole(tmp_path):
    origin = stored(tmp_path)
    net = network(origin.config, seed=1)
    report = warmstart.start_from(net, origin)
    assert (report.share, report.missing, report.resized, report.unexpected) == (1.0, [], [], [])
    assert all(torch.equal(v, origin.tensors[k]) for k, v in net.state_dict().items())


def test_another_image_size_interpolates_positions_and_keeps_the_time_token(tmp_path):
    origin = stored(tmp_path)
    origin.tensors["pos_embed"][:, 1:] = torch.linspace(-1, 1, 64).view(1, 64, 1)
    net = network(resolved({"data": {"image_size": 32}}), seed=1)
    report = warmstart.start_from(net, origin)
    assert report.resized == ["pos_embed"]
    assert torch.equal(net.pos_embed[:, 0], origin.tensors["pos_embed"][:, 0])
    coarse = net.pos_embed[0, 1:, 0].view(16, 16).unflatten(0, (8, 2)).unflatten(2, (8, 2)).mean((1, 3))
    assert torch.allclose(coarse.flatten(), torch.linspace(-1, 1, 64), atol=0.05)


def test_classes_may_be_added(tmp_path):
    origin = stored(tmp_path)
    conditional = network(resolved({"model": {"num_classes": 10}}), seed=1)
    fresh = conditional.state_dict()["pos_embed"][:, 0].clone()
    report = warmstart.start_from(conditional, origin)
    assert report.missing == ["label_emb.weight"]
    assert conditional.special_tokens == ("label", "time")
    assert torch.equal(conditional.pos_embed[:, 1:], origin.tensors["pos_embed"])
    assert torch.equal(conditional.pos_embed[:, 0], fresh)

    origin = stored(tmp_path, {"model": {"num_classes": 3}})
    more = network(resolved({"model": {"num_classes": 5}}), seed=1)
    report = warmstart.start_from(more, origin)
    assert report.resized == ["label_emb.weight"]
    assert torch.equal(more.label_emb.weight[:3], origin.tensors["label_emb.weight"][:3])
    assert torch.equal(more.label_emb.weight[5], origin.tensors["label_emb.weight"][3])


def test_rows_that_agree_by_chance_are_not_taken_for_the_same(tmp_path):
    """A label token more and a patch less could give tables of one shape."""
    origin = stored(tmp_path)
    net = network(resolved({"data": {"image_size": 16}}), seed=1)
    net.grid = (4, 16)
    before = net.pos_embed.clone()
    report = warmstart.start_from(net, origin)
    assert report.resized == ["pos_embed"]
    assert not torch.equal(net.pos_embed, before)


def test_another_wavelet_level_keeps_the_trunk(tmp_path):
    origin = stored(tmp_path, {"codec": {"name": "dwt", "level": 1}})
    net = network(resolved({"codec": {"name": "dwt", "level": 2}}), seed=1)
    report = warmstart.start_from(net, origin)
    assert set(report.missing) == {"patch_embed.weight", "to_output.weight", "to_output.bias"}
    assert "pos_embed" in report.resized
    assert torch.equal(net.mid_block.mlp.fc1.weight, origin.tensors["mid_block.mlp.fc1.weight"])


def test_another_architecture_is_refused_unless_partial_is_allowed(tmp_path):
    origin = stored(tmp_path)
    wide = network(resolved({"model": {"hidden_size": 32}}), seed=1)
    with pytest.raises(UsageError, match=r"only \d+% of the network's parameters .*--allow-partial"):
        warmstart.start_from(wide, origin)
    assert warmstart.start_from(wide, origin, allow_partial=True).share < 0.5


def test_damaged_and_foreign_files_are_refused(tmp_path):
    stored(tmp_path)
    path = tmp_path / "w.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(MsmdiffError, match=r"w.safetensors is truncated or damaged"):
        weights.read(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(MsmdiffError, match="is no checkpoint of"):
        weights.read(path)
    save_file({"a": torch.zeros(1)}, path, {"msmdiff": '{"version": 99, "config": {}}'})
    with pytest.raises(MsmdiffError, match="written by a newer msmdiff"):
        weights.read(path)
    save_file({"a": torch.zeros(1)}, path, {"msmdiff": f'{{"version": 1, "config": {resolved().to_json()}}}'})
    with pytest.raises(MsmdiffError, match="does not hold the network that it describes"):
        weights.load(path)
    with pytest.raises(UsageError, match="neither a weights file nor a run"):
        weights.locate(tmp_path / "nowhere")
