import json

import pytest
import torch
from safetensors.torch import save_file

from msmdiff.core import backbones, weights
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.sections import ModelConfig
from msmdiff.core.training import warmstart
from msmdiff.core.weights import published

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
    coarse = (
        net.pos_embed[0, 1:, 0].view(16, 16).unflatten(0, (8, 2)).unflatten(2, (8, 2)).mean((1, 3))
    )
    assert torch.allclose(coarse.flatten(), torch.linspace(-1, 1, 64), atol=0.05)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dit", dict(depth=2, num_heads=2)),
        ("mdtv2", dict(depth=4, num_heads=2, decode_layers=2)),
        ("edt", dict(stage_widths=[16] * 5, stage_depths=[1] * 5, stage_heads=[2] * 5)),
    ],
)
def test_every_family_goes_to_another_grid(tmp_path, name, fields):
    """Fixed positions are those of the new grid, learned ones and bias tables are interpolated,
    nothing starts anew.
    """
    model = {"model": {"name": None, "family": name, "patch_size": 2, "hidden_size": 16, **fields}}
    small = road.resolve(configuration.build(model))
    large = road.resolve(configuration.build(model, {"data": {"image_size": 32}}))
    weights.save(tmp_path / "w.safetensors", network(small).state_dict(), small)
    origin, net = weights.read(tmp_path / "w.safetensors"), network(large, seed=1)
    tables = {
        k: v for k, v in road.build(large).backbone.state_dict().items() if k.endswith("pos_embed")
    }
    net.load_state_dict(tables, strict=False)
    for key in [k for k in origin.tensors if k.endswith("bias_table")]:
        side = int(len(origin.tensors[key]) ** 0.5)
        origin.tensors[key][: side**2] = torch.linspace(-1, 1, side).repeat(side)[
            :, None
        ]  # grows with the column
    report = warmstart.start_from(net, origin)
    assert (report.missing, report.unexpected, report.share) == ([], [], 1.0)
    state = net.state_dict()
    for key in [k for k in state if k.endswith("bias_table")]:
        side = int(len(state[key]) ** 0.5)
        assert side > int(len(origin.tensors[key]) ** 0.5)
        assert torch.allclose(
            state[key][: side**2, 0], torch.linspace(-1, 1, side).repeat(side), atol=0.1
        )
    if name != "mdtv2":
        assert all(torch.equal(state[k], tables[k]) for k in tables)
    assert ("decoder_pos_embed" in report.resized) == (name == "mdtv2")


@pytest.mark.parametrize("detail_scale", [1, 2])
def test_a_wavelet_networks_two_grids_are_interpolated_each(tmp_path, detail_scale):
    model = {
        "name": None,
        "family": "maskdwt",
        "patch_size": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "depth": 3,
    }
    layers = {"model": model | {"detail_scale": detail_scale}, "codec": {"name": "dwt"}}
    origin = stored(tmp_path, layers)
    details = (8 // detail_scale) ** 2
    origin.tensors["pos_embed"][:, 1:65] = torch.linspace(-1, 1, 64).view(1, 64, 1)
    origin.tensors["pos_embed"][:, 65:] = torch.linspace(1, 5, details).view(1, details, 1)
    net = network(resolved(layers, {"data": {"image_size": 32}}), seed=1)
    assert warmstart.start_from(net, origin).resized == ["pos_embed"]
    time, approx, detail = net.pos_embed[0, :, 0].split([1, 256, 256 // detail_scale**2])
    assert torch.equal(time, origin.tensors["pos_embed"][0, :1, 0])
    for fine, coarse in (
        (approx, torch.linspace(-1, 1, 64)),
        (detail, torch.linspace(1, 5, details)),
    ):
        blocks = fine.view(1, 1, int(len(fine) ** 0.5), -1)
        assert torch.allclose(
            torch.nn.functional.avg_pool2d(blocks, 2).flatten(), coarse, atol=0.12
        )


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
    with pytest.raises(UsageError, match=r"knows 3 classes, this training 5, .*--allow-partial"):
        warmstart.start_from(more, origin)
    report = warmstart.start_from(more, origin, allow_partial=True)
    assert report.classes == "classes 0 to 2 taken by number: no names to go by"
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
    with pytest.raises(
        UsageError, match=r"only \d+% of the network's parameters .*--allow-partial"
    ):
        warmstart.start_from(wide, origin)
    assert warmstart.start_from(wide, origin, allow_partial=True).share < 0.5


def test_damaged_and_foreign_files_are_refused(tmp_path):
    stored(tmp_path)
    path = tmp_path / "w.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        MsmdiffError, match=r"w.safetensors is not a safetensors file that can be read"
    ):
        weights.read(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(MsmdiffError, match="is no checkpoint of"):
        weights.read(path)
    save_file({"a": torch.zeros(1)}, path, {"msmdiff": '{"version": 99, "config": {}}'})
    with pytest.raises(MsmdiffError, match="written by a newer msmdiff"):
        weights.read(path)
    save_file(
        {"a": torch.zeros(1)},
        path,
        {"msmdiff": f'{{"version": 1, "config": {json.dumps(resolved().as_dict())}}}'},
    )
    with pytest.raises(MsmdiffError, match="does not hold the network that it describes"):
        weights.load(path)
    with pytest.raises(UsageError, match="neither a weights file nor a run"):
        weights.locate(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_resized_as_the_same_numbers_in_single(tmp_path, kind):
    origin = stored(tmp_path)
    origin.tensors = {name: tensor.to(kind).float() for name, tensor in origin.tensors.items()}
    larger = resolved({"data": {"image_size": 32}})
    whole = network(larger, seed=1)
    warmstart.start_from(whole, origin)
    origin.tensors = {name: tensor.to(kind) for name, tensor in origin.tensors.items()}
    half = network(larger, seed=1)
    report = warmstart.start_from(half, origin)
    assert report.resized == ["pos_embed"]
    assert torch.equal(half.pos_embed, whole.pos_embed)


@pytest.mark.parametrize(
    "claim",
    [
        {"model": {"depth": 10**6 + 1}},
        {"model": {"hidden_size": 2**20, "num_heads": 2}},
        {"model": {"num_classes": 10**11}},
        {"data": {"image_size": 2**20}},
    ],
)
def test_a_file_that_claims_a_huge_network_is_refused_before_one_is_made(tmp_path, claim):
    origin = stored(tmp_path)
    config = origin.config.as_dict()
    for section, fields in claim.items():
        config[section] |= fields
    about = {"msmdiff": json.dumps({"version": 2, "config": config})}
    save_file(origin.tensors, tmp_path / "w.safetensors", about)
    with pytest.raises(
        MsmdiffError, match=r"does not hold the network that it describes|less than or equal to"
    ):
        weights.read(tmp_path / "w.safetensors")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    origin = stored(tmp_path)
    origin.tensors["pos_embed"][0, 0, 0] = float("inf")
    weights.save(tmp_path / "w.safetensors", origin.tensors, origin.config)
    with pytest.raises(MsmdiffError, match=r"w\.safetensors holds numbers that are not finite"):
        weights.read(tmp_path / "w.safetensors")


def test_the_null_row_is_nobody_elses(tmp_path):
    """From a network that knows labels only: every class keeps its row, and the null class starts
    fresh.
    """
    labels_only = {
        "model": {"num_classes": 4, "null_class": False},
        "objective": {"label_dropout": 0.0},
    }
    origin = stored(tmp_path, labels_only)
    for classes in (4, 3):  # 3 classes and a null class have as many rows
        net = network(resolved({"model": {"num_classes": classes}}), seed=1)
        fresh = net.label_emb.weight[-1].clone()
        report = warmstart.start_from(net, origin, allow_partial=True)
        assert report.resized == ["label_emb.weight"]
        assert torch.equal(net.label_emb.weight[:-1], origin.tensors["label_emb.weight"][:classes])
        assert torch.equal(net.label_emb.weight[-1], fresh)


@pytest.mark.parametrize(
    ("names", "rows", "said"),
    [
        (["cat", "dog"], [0, 1, 2], ""),
        (["dog", "cat"], [1, 0, 2], "classes matched by name: dog, cat; new: none"),
        (["ant", "cat"], [None, 0, 2], "classes matched by name: cat; new: ant"),
        (["ant", "cat", "dog"], [None, 0, 1, 2], "classes matched by name: cat, dog; new: ant"),
        ([], [0, 1, 2], "classes 0 to 1 taken by number: no names to go by"),
    ],
)
def test_classes_are_matched_by_name(tmp_path, names, rows, said):
    origin = stored(tmp_path, {"model": {"num_classes": 2}})
    origin.notes["class_names"] = '["cat", "dog"]'
    net = network(resolved({"model": {"num_classes": len(rows) - 1}}), seed=1)
    fresh = net.label_emb.weight.clone()
    report = warmstart.start_from(net, origin, class_names=names)
    assert report.classes == said
    table = origin.tensors["label_emb.weight"]
    for new, old in enumerate(rows):
        expected = fresh[new] if old is None else table[old]
        assert torch.equal(net.label_emb.weight[new], expected)


def test_a_next_stage_takes_over_the_network_and_not_how_long_the_last_one_went():
    last = resolved(
        {"model": {"num_classes": 3, "null_class": False}, "objective": {"label_dropout": 0.0}},
        {"optim": {"schedule": "cosine", "clip_grad_norm": 0.5}},
        {"train": {"steps": 20, "max_seconds": 0.5, "batch_size": 16, "init_from": "primer"}},
    )
    assert last.optim.decay_steps == 20
    longer = {"model": {"hidden_size": 64}, "train": {"steps": 60}}
    now = resolved(warmstart.next_stage(last), longer)
    assert (now.optim.schedule, now.optim.decay_steps, now.train.max_seconds) == (
        "cosine",
        60,
        None,
    )
    assert now.optim.lr == road.derived_rate(now.model)
    assert (now.train.batch_size, now.optim.clip_grad_norm, now.train.init_from) == (16, 0.5, None)
    assert now.model.null_class is False
    assert warmstart.told_by(now)["null_class"] is False


@pytest.mark.parametrize("family", ["mdt", "mdtv2"])
def test_a_network_of_another_family_starts_from_what_both_have(tmp_path, family):
    fields = dict(name=None, patch_size=2, hidden_size=16, depth=2, num_heads=2, learn_sigma=True)
    dit = backbones.resolve(ModelConfig(family="dit", num_classes=3, **fields))
    tensors = backbones.build(dit, (3, 8, 8)).state_dict()
    torch.save(published.export(tensors, dit, (3, 8, 8), "dit"), tmp_path / "dit.pt")
    model = {**fields, "family": family, "num_classes": 3, "decode_layers": 1}
    config = road.resolve(configuration.build({"model": model, "data": {"image_size": 8}}))
    hints = warmstart.told_by(config)
    assert hints == {"num_heads": 2, "decode_layers": 1}
    found = weights.read(tmp_path / "dit.pt", hints=hints)
    assert found.config.model.family == "dit"
    net = road.build(config).backbone
    if family == "mdt":
        report = warmstart.start_from(net, found)
        assert report.share == pytest.approx(0.74, abs=0.01)
        assert torch.equal(net.blocks[1].mlp.fc1.weight, tensors["blocks.1.mlp.fc1.weight"])
    else:
        with pytest.raises(UsageError, match=r"only 35% of the network's parameters are in"):
            warmstart.start_from(net, found)
    with pytest.raises(UsageError, match=r"unknown configuration key 'model.decode_layers'"):
        weights.read(tmp_path / "dit.pt", {"num_heads": 2, "decode_layers": 1})


def test_a_folder_of_a_runs_name_does_not_hide_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "two"
    run.mkdir(parents=True)
    (run / "weights.safetensors").write_bytes(b"")
    (tmp_path / "two").mkdir()
    assert weights.locate("two").resolve() == run / "weights.safetensors"
