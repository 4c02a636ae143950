"""`msmdiff.load` and the command line on published checkpoints: one way in, without a conversion
step.
"""

import json
import shutil

import numpy as np
import pytest
import torch

import msmdiff
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import weights
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.weights import published
from msmdiff.core.weights.layout import mlp_ratio

CASES = [
    "dit_released",
    "dit_train",
    "mdtv1",
    "mdtv2",
    "edt_s",
    "uvit_uncond_conv",
    "maskdm_cond",
    "maskdwt",
]


def heads_of(case):
    """What shapes do not tell, by the case's own hyper-parameters."""
    given = json.loads((case / "case.json").read_text())["hyper_parameters"]
    for name in ("num_heads", "encoder_heads"):
        if isinstance(given.get(name), int):
            return {"num_heads": given[name]}
    return {}


def fields(golden, name):
    """Head counts are given where neither shapes nor a published size tell them, as a user would be
    told to.
    """
    return {} if name in ("mdtv1", "mdtv2", "edt_s") else heads_of(golden / name)


def test_what_shapes_do_not_tell_is_asked_for_by_name(golden):
    with pytest.raises(UsageError, match=r"--set model\.num_heads="):
        msmdiff.load(golden / "dit_released" / "checkpoint.pt")


@pytest.mark.parametrize("name", CASES)
def test_a_published_checkpoint_is_ready_to_sample_from(golden, name):
    loaded = msmdiff.load(golden / name / "checkpoint.pt", **fields(golden, name))
    assert not loaded.backbone.training
    assert name.startswith(loaded.report["layout"][:4])
    schedule = loaded.config.process.schedule
    if name.startswith(("dit", "mdt", "edt")):
        assert schedule == "linear"
        assert loaded.config.sample.cfg_channels == "first3"
        assert (getattr(loaded.config.sample, "cfg_power", None) == 4.0) == name.startswith("mdt")
    elif name.startswith("uvit"):
        assert schedule == "vp_sde"
    else:  # MaskDM's buffers tell
        case = json.loads((golden / name / "case.json").read_text())
        assert schedule == case["hyper_parameters"]["beta_schedule"]
    x = torch.randn(2, *loaded.codec.shape)
    out = loaded.backbone(x, torch.tensor([3.0, 900.0]))
    prediction = loaded.process.split(out, x, torch.tensor([0.004, 0.9]))
    assert prediction.x0.shape == x.shape
    assert (prediction.variance is not None) == bool(out.shape[1] == 2 * x.shape[1])


def test_conversion_and_export_round_trip_on_the_command_line(golden, cli, tmp_path):
    source = golden / "mdtv2" / "checkpoint.pt"
    cli("weights", "convert", str(source), "-o", "mdt.safetensors")
    cli("weights", "export", "mdt.safetensors", "--format", "mdt", "-o", "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    original = torch.load(source, weights_only=True)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[k], original[k]) for k in original)
    shown = cli("weights", "show", "mdt.safetensors").stdout
    assert "published by mdt" in shown
    assert "G multiply-adds" in shown
    assert "final.modulation.weight" in cli("weights", "show", str(source), "--keys").stdout
    done = cli("weights", "convert", str(source), "--family", "dit", code=2)
    assert "is a mdt checkpoint, not dit" in done.stderr
    assert (
        "cannot hold a network"
        in cli("weights", "export", "mdt.safetensors", "--format", "dit", code=2).stderr
    )


def test_maskdm_is_written_as_its_own_code_saves_it(golden, cli, tmp_path):
    source = golden / "maskdm_cond" / "checkpoint.pt"
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "maskdm_cond").items()]
    cli("weights", "export", str(source), *sets, "--format", "maskdm", "-o", "back.pt")
    back, original = (
        torch.load(path, weights_only=True) for path in (tmp_path / "back.pt", source)
    )
    assert back["model"].keys() == original["model"].keys()
    assert back["ema"].keys() == original["ema"].keys()
    for name, tensor in original["ema"].items():
        if name.startswith("ema_model.model."):  # the average is what was read
            assert torch.equal(back["ema"][name], tensor), name
            assert torch.equal(back["model"][name.removeprefix("ema_model.")], tensor), name
    for name, tensor in original["model"].items():
        if not name.startswith("model."):
            gap = dict(rtol=1e-4, atol=1e-6) if "log" in name else dict(rtol=2e-5, atol=1e-7)
            torch.testing.assert_close(back["model"][name], tensor, **gap)
    loaded = [
        msmdiff.load(path, **fields(golden, "maskdm_cond"))
        for path in (tmp_path / "back.pt", source)
    ]
    assert loaded[0].config == loaded[1].config


def small_dit(**fields):
    config = configuration.build(
        {
            "data": {"image_size": 16},
            "process": {"schedule": "linear"},
            "model": {
                "name": None,
                "family": "dit",
                "patch_size": 2,
                "hidden_size": 24,
                "depth": 3,
                "num_heads": 3,
            }
            | {"num_classes": 5, "learn_sigma": True, **fields},
        }
    )
    network = road.build(road.resolve(config)).backbone
    for p in network.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    return road.resolve(config), network.eval()


def test_diffusers_opens_an_exported_dit_and_computes_the_same(cli, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config, network = small_dit()
    weights.save(tmp_path / "dit.safetensors", network.state_dict(), config)
    assert (
        "downscale_freq_shift = 0"
        in cli("weights", "export", "dit.safetensors", "--format", "diffusers").stdout
    )
    theirs, loading = diffusers.DiTTransformer2DModel.from_pretrained(
        tmp_path / "dit.diffusers", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 4, 5])
    with torch.no_grad():
        t = torch.zeros(4, dtype=torch.long)
        torch.testing.assert_close(theirs(x, t, y).sample, network(x, t, y), rtol=1e-4, atol=1e-5)
        t = torch.tensor([1, 250, 600, 999])
        assert not torch.allclose(theirs(x, t, y).sample, network(x, t, y), rtol=1e-2, atol=1e-2)
        for block in theirs.transformer_blocks:  # as the command's note says
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        torch.testing.assert_close(theirs(x, t, y).sample, network(x, t, y), rtol=1e-4, atol=1e-5)


def test_what_diffusers_cannot_hold_is_refused(cli, tmp_path):
    for fields, complaint in (
        (dict(num_classes=0), "num_classes 0"),
        (dict(mlp_ratio=2.0), "mlp_ratio 2.0"),
    ):
        config, network = small_dit(**fields)
        weights.save(tmp_path / "dit.safetensors", network.state_dict(), config)
        assert (
            complaint
            in cli("weights", "export", "dit.safetensors", "--format", "diffusers", code=2).stderr
        )
    assert not (tmp_path / "dit.diffusers").exists()


def test_pixels_are_sampled_and_finetuned_from_a_published_checkpoint(golden, cli, tmp_path):
    source = str(golden / "maskdm_uncond" / "checkpoint.pt")
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "maskdm_uncond").items()]
    cli("sample", source, *sets, "--n", "3", "--steps", "4", "--out", "s")
    settings = json.loads((tmp_path / "s" / "sample.json").read_text())["sample"]
    assert (settings["sampler"], settings["eta"], settings["times"]) == ("ddim", 1.0, "maskdm")
    done = cli(
        "finetune",
        "--ckpt",
        source,
        *sets,
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--run",
        "t",
        "--set",
        "train.preview_every=0",
    )
    assert "100% of the parameters" in done.stdout
    assert "schedule: cosine" in (tmp_path / "runs" / "t" / "config.yaml").read_text()


def test_latents_need_a_vae_and_say_so(golden, cli):
    source = str(golden / "dit_released" / "checkpoint.pt")
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "dit_released").items()]
    done = cli("sample", source, *sets, "--n", "1", "--steps", "2", code=2)
    assert "--set codec.vae=FOLDER" in done.stderr


def test_a_local_vae_decodes_published_latents(golden, cli, tmp_path, vae):
    diffusers = pytest.importorskip("diffusers")
    folder = shutil.copytree(vae, tmp_path / "vae")  # it is torn below
    network = diffusers.AutoencoderKL.from_pretrained(folder)
    from PIL import Image

    from msmdiff.core.diffusion.codecs.vae import VaeCodec

    source = str(golden / "dit_released" / "checkpoint.pt")
    loaded = msmdiff.load(source, **fields(golden, "dit_released"))
    side = 8 * loaded.codec.shape[1]
    codec = VaeCodec(side, vae=str(tmp_path / "vae"), scale=0.5)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    moments = codec.pack(images)
    posterior = network.eval().encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(
        moments, torch.cat([posterior.mean, posterior.std], 1), rtol=1e-4, atol=1e-5
    )
    draws = torch.stack(
        [codec.encode(moments, torch.Generator().manual_seed(i)) for i in range(400)]
    )
    torch.testing.assert_close(
        draws.mean(0) / 0.5, posterior.mean, rtol=0.1, atol=0.3 * posterior.std.max().item()
    )
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "dit_released").items()]
    cli("sample", source, *sets, "--set", "codec.vae=vae", "--n", "2", "--steps", "2", "--out", "s")
    assert np.asarray(Image.open(tmp_path / "s" / "000001.png")).shape == (side, side, 3)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    done = cli(
        "sample",
        source,
        *sets,
        "--set",
        "codec.vae=vae",
        "--n",
        "2",
        "--steps",
        "2",
        "--out",
        "s2",
        code=1,
    )
    assert "codec.vae vae cannot be loaded" in done.stderr


def test_ours_and_theirs_come_through_one_door(golden, tmp_path):
    stored = weights.read(golden / "mdtv2" / "checkpoint.pt")
    weights.save(tmp_path / "ours.safetensors", stored.tensors, stored.config, **stored.notes)
    ours, theirs = (
        msmdiff.load(tmp_path / "ours.safetensors"),
        msmdiff.load(golden / "mdtv2" / "checkpoint.pt"),
    )
    assert ours.config == theirs.config
    x, t = torch.randn(1, *ours.codec.shape), torch.tensor([5.0])
    assert torch.equal(ours.backbone(x, t), theirs.backbone(x, t))


def test_a_distance_takes_a_published_checkpoint_directly(golden, cli):
    source = str(golden / "maskdm_uncond" / "checkpoint.pt")
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "maskdm_uncond").items()]
    done = cli(
        "fid",
        source,
        "digits:test",
        *sets,
        "--set=sample.steps=3",
        "--n",
        "12",
        "--features",
        "pixel",
    )
    assert "(12 images) against digits:test (360 images)" in done.stdout


def test_a_network_without_a_null_class_opens(tmp_path, cli):
    """The published ImageNet-64 models know 1000 labels and no null class."""
    config = road.resolve(
        configuration.build(
            {
                "model": {
                    "name": "tiny",
                    "hidden_size": 16,
                    "num_heads": 2,
                    "depth": 3,
                    "null_class": False,
                }
                | {"num_classes": 1000, "final_conv": True},
                "objective": {"label_dropout": 0.0},
            }
        )
    )
    state = published.export(
        road.build(config).backbone.state_dict(), config.model, (3, 16, 16), "uvit"
    )
    torch.save(state, tmp_path / "in64.pth")
    loaded = msmdiff.load(tmp_path / "in64.pth", num_heads=2)
    assert (loaded.config.model.num_classes, loaded.config.objective.label_dropout) == (1000, 0.0)
    done = cli(
        "sample",
        "in64.pth",
        "--set",
        "model.num_heads=2",
        "--n",
        "2",
        "--steps",
        "2",
        "--cfg",
        "2",
        code=2,
    )
    assert "no null class to guide away from" in done.stderr


@pytest.mark.parametrize("family", ["dit", "mdt", "mdtv2", "edt"])
def test_labels_without_a_null_class_and_odd_mlp_ratios_open_when_told(tmp_path, cli, family):
    """Trained without label dropout, a table of K rows is K classes; a variance that is not learned
    is beta.
    """
    stages = {
        "stage_widths": [12, 16, 20, 16, 12],
        "stage_depths": [1] * 5,
        "stage_heads": [3, 4, 5, 4, 3],
    }
    own = stages if family == "edt" else {"depth": 4, "num_heads": 3}
    own |= {"decode_layers": 2} if family.startswith("mdt") else {}
    model = {
        "name": None,
        "family": family,
        "patch_size": 2,
        "hidden_size": 12,
        "mlp_ratio": 2.7,
        "num_classes": 10,
    }
    model |= own | {"null_class": False}
    layers = {"data": {"image_size": 16}, "model": model, "objective": {"label_dropout": 0}}
    config = road.resolve(configuration.build(layers))
    network = road.build(config).backbone.eval()
    assert network.label_emb.num_embeddings == 10
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # as published, the last layer is zero
    name = "mdt" if family == "mdtv2" else family
    torch.save(
        published.export(network.state_dict(), config.model, (3, 16, 16), name), tmp_path / "k.pt"
    )
    told = {"num_heads": 3} if family == "dit" else {}
    assert msmdiff.load(tmp_path / "k.pt", **told).config.model.num_classes == 9
    loaded = msmdiff.load(tmp_path / "k.pt", **told, null_class=False)
    assert (loaded.config.model.num_classes, loaded.config.objective.label_dropout) == (10, 0.0)
    assert (loaded.config.sample.cfg_scale, loaded.config.sample.variance) == (1.0, "large")
    x, t, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 9])
    with torch.no_grad():
        assert torch.equal(loaded.backbone(x, t, y), network(x, t, y))
    with pytest.raises(UsageError, match="no null class"):
        network(x, t)
    if family == "dit":
        sets = ["--set", "model.num_heads=3", "--set", "model.null_class=false"]
        cli("sample", "k.pt", *sets, "--n", "10", "--steps", "2", "--out", "s")
        done = cli("sample", "k.pt", *sets, "--n", "2", "--steps", "2", "--cfg", "2", code=2)
        assert "no null class to guide away from" in done.stderr
        done = cli("weights", "export", "k.pt", *sets, "--format", "diffusers", "-o", "d", code=2)
        assert "null_class false" in done.stderr


@pytest.mark.parametrize("ratio", [4.0, 2.7, 1.4142, 8 / 3, 3.999])
@pytest.mark.parametrize("widths", [(12,), (12, 16, 20), (936, 1248, 1560), (7, 13)])
def test_an_mlp_ratio_fits_every_width(ratio, widths):
    inner = {width: int(width * ratio) for width in widths}
    found = mlp_ratio(inner)
    assert {width: int(width * found) for width in widths} == inner
    assert found == 4.0 or ratio != 4.0


def test_widths_without_a_common_mlp_ratio_are_refused():
    with pytest.raises(MsmdiffError, match="no one MLP ratio"):
        mlp_ratio({10: 20, 20: 50})


def test_a_run_is_sampled_from_the_average_it_names(tmp_path):
    config = road.resolve(
        configuration.build({"sample": {"ema": 0.99}, "ema": {"decays": [0.9, 0.99]}})
    )
    tensors = road.build(config).backbone.state_dict()
    folder = tmp_path / "r" / "checkpoints" / "img-000000008"
    folder.mkdir(parents=True)
    weights.save(tmp_path / "r" / "weights.safetensors", tensors, config)
    tensors = {k: v + 1 for k, v in tensors.items()}
    weights.save(folder / "ema-0.99.safetensors", tensors, config)
    loaded = msmdiff.load(tmp_path / "r")
    assert loaded.path == folder / "ema-0.99.safetensors"
    assert torch.equal(loaded.backbone.pos_embed, tensors["pos_embed"])


def test_no_output_replaces_what_msmdiff_did_not_write(golden, cli, tmp_path):
    source = str(golden / "mdtv2" / "checkpoint.pt")
    mine = tmp_path / "mine.safetensors"
    mine.write_text("MINE")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("MINE")
    for arguments in (
        ("convert", source, "-o", "mine.safetensors"),
        ("export", source, "--format", "mdt", "-o", "mine.safetensors"),
        ("export", source, "--format", "diffusers", "-o", "folder"),
    ):
        done = cli("weights", *arguments, code=2)
        assert "is there already" in done.stderr
        assert "--overwrite" in done.stderr
    assert mine.read_text() == "MINE"
    assert (tmp_path / "folder" / "config.json").read_text() == "MINE"
    cli("weights", "convert", source, "-o", "mine.safetensors", "--overwrite")
    # What it wrote, it writes again, also into a folder that is new.
    cli("weights", "convert", source, "-o", "mine.safetensors")
    cli("weights", "convert", source, "-o", "new/mdt.safetensors")
    assert (tmp_path / "new" / "mdt.safetensors").read_bytes() == mine.read_bytes()
