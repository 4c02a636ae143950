"""`msmdiff.load` and the command line on published checkpoints: one way in, without a conversion step."""

import json

import numpy as np
import pytest
import torch

import msmdiff
from msmdiff.core import weights
from msmdiff.core.errors import UsageError

CASES = ["dit_released", "dit_train", "mdtv1", "mdtv2", "edt_s", "uvit_uncond_conv", "maskdm_cond", "maskdwt"]


def heads_of(case):
    """What shapes do not tell, by the case's own hyper-parameters."""
    given = json.loads((case / "case.json").read_text())["hyper_parameters"]
    for name in ("num_heads", "encoder_heads"):
        if isinstance(given.get(name), int):
            return {"num_heads": given[name]}
    return {}


def fields(golden, name):
    """Head counts are given where neither shapes nor a published size tell them, as a user would be told to."""
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
        assert (loaded.config.sample.cfg_power == 4.0) == name.startswith("mdt")
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
    assert "cannot hold a network" in cli("weights", "export", "mdt.safetensors", "--format", "dit", code=2).stderr


def test_pixels_are_sampled_and_finetuned_from_a_published_checkpoint(golden, cli, tmp_path):
    source = str(golden / "maskdm_uncond" / "checkpoint.pt")
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "maskdm_uncond").items()]
    cli("sample", source, *sets, "--n", "3", "--steps", "4", "--out", "s")
    settings = json.loads((tmp_path / "s" / "sample.json").read_text())["sample"]
    assert (settings["sampler"], settings["eta"], settings["grid"]) == ("ddim", 1.0, "maskdm")
    done = cli("finetune", "--ckpt", source, *sets, "--steps", "2", "--batch-size", "4", "--run", "t",
               "--set", "train.preview_every=0")  # fmt: skip
    assert "100% of the parameters" in done.stdout
    assert "schedule: cosine" in (tmp_path / "runs" / "t" / "config.yaml").read_text()


def test_latents_need_a_vae_and_say_so(golden, cli):
    source = str(golden / "dit_released" / "checkpoint.pt")
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "dit_released").items()]
    done = cli("sample", source, *sets, "--n", "1", "--steps", "2", code=2)
    assert "--set codec.vae=FOLDER" in done.stderr


def test_a_local_vae_decodes_published_latents(golden, cli, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    from PIL import Image

    from msmdiff.core.diffusion.codecs import VaeCodec

    source = str(golden / "dit_released" / "checkpoint.pt")
    loaded = msmdiff.load(source, **fields(golden, "dit_released"))
    side = 8 * loaded.codec.shape[1]
    codec = VaeCodec(side, str(tmp_path / "vae"), 0.5)
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    moments = codec.pack(images)
    posterior = vae.eval().encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], 1), rtol=1e-4, atol=1e-5)
    draws = torch.stack([codec.encode(moments, torch.Generator().manual_seed(i)) for i in range(400)])
    torch.testing.assert_close(draws.mean(0) / 0.5, posterior.mean, rtol=0.1, atol=0.3 * posterior.std.max().item())
    sets = [f"--set=model.{k}={v}" for k, v in fields(golden, "dit_released").items()]
    cli("sample", source, *sets, "--set", "codec.vae=vae", "--n", "2", "--steps", "2", "--out", "s")
    assert np.asarray(Image.open(tmp_path / "s" / "000001.png")).shape == (side, side, 3)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    done = cli("sample", source, *sets, "--set", "codec.vae=vae", "--n", "2", "--steps", "2", "--out", "s2", code=1)
    assert "codec.vae vae cannot be loaded" in done.stderr


def test_ours_and_theirs_come_through_one_door(golden, tmp_path):
    stored = weights.read(golden / "mdtv2" / "checkpoint.pt")
    weights.save(tmp_path / "ours.safetensors", stored.tensors, stored.config, **stored.notes)
    ours, theirs = msmdiff.load(tmp_path / "ours.safetensors"), msmdiff.load(golden / "mdtv2" / "checkpoint.pt")
    assert ours.config == theirs.config
    x, t = torch.randn(1, *ours.codec.shape), torch.tensor([5.0])
    assert torch.equal(ours.backbone(x, t), theirs.backbone(x, t))
