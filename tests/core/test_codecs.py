import re

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import section
from msmdiff.core.data.embedded import Digits
from msmdiff.core.diffusion.codecs import build, to_uint8, to_unit
from msmdiff.core.diffusion.codecs.dwt import DwtCodec
from msmdiff.core.diffusion.codecs.pixel import PixelCodec
from msmdiff.core.errors import MsmdiffError, UsageError

WAVELETS = ["haar", "db2", "db4", "sym5", "coif1", "bior1.3", "bior4.4", "rbio3.1", "bior3.9"]


def images(n=4, size=32, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), np.uint8)
    )


def oracle(x, wavelet, level):
    approximation, *details = pywt.wavedec2(
        x.double().numpy(), wavelet, mode="periodization", level=level
    )
    folded = [
        F.pixel_unshuffle(torch.from_numpy(b), 2**i)
        for i, bands in enumerate(details)
        for b in bands
    ]
    return torch.cat([torch.from_numpy(approximation), *folded], 1)


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_dwt_equals_pywavelets_and_inverts(wavelet, level):
    codec, x = DwtCodec(32, wavelet=wavelet, level=level), to_unit(images())
    z = codec.transform(x)
    assert z.shape[1:] == codec.shape == (3 * 4**level, 32 // 2**level, 32 // 2**level)
    assert (z - oracle(x, wavelet, level)).abs().max() <= 1e-5
    assert (codec.inverse(z) - x).abs().max() <= 1e-5


def test_haar_level_one_packs_256_pixels_into_12_channels():
    assert DwtCodec(256).shape == (12, 128, 128)


@settings(max_examples=20, deadline=None)
@given(wavelet=st.sampled_from(WAVELETS), level=st.integers(1, 2), seed=st.integers(0, 99))
def test_images_survive_the_round_trip_exactly(wavelet, level, seed):
    packed = images(seed=seed)
    codec = DwtCodec(32, wavelet=wavelet, level=level)
    measured = codec.measure([packed])
    for each in (
        PixelCodec(32),
        codec,
        DwtCodec(32, wavelet=wavelet, level=level, **measured),
    ):
        assert torch.equal(each.decode(each.encode(each.pack(packed))), packed)


def test_measured_statistics_give_unit_bands():
    source = Digits()
    pixels = np.stack([np.asarray(source.read(i).resize((16, 16))) for i in range(300)])
    packed = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    measured = DwtCodec(16, level=2).measure(packed.split(64))
    z = DwtCodec(16, level=2, **measured).encode(packed)
    for band in z.split([3, 3, 3, 3, 12, 12, 12], dim=1):
        assert abs(band.mean()) < 1e-4
        assert abs(band.std() - 1) < 1e-3
    assert torch.equal(to_uint8(to_unit(packed)), packed)


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
def test_clip_leaves_real_images_alone_and_bounds_the_rest(wavelet):
    packed = images(8)
    packed[0], packed[1] = 0, 255
    measured = DwtCodec(32, wavelet=wavelet, level=2).measure([packed])
    codec = DwtCodec(32, wavelet=wavelet, level=2, **measured)
    z = codec.encode(packed)
    assert torch.allclose(codec.clip(z), z, atol=1e-5)
    wild = codec.clip(z * 1000)
    assert wild.abs().max() < z.abs().max() * 200
    assert torch.equal(
        PixelCodec(8).clip(torch.tensor([-3.0, 0.5, 2.0])), torch.tensor([-1.0, 0.5, 1.0])
    )


def test_uint8_rounds_and_clamps():
    x = torch.tensor([-2.0, -1.0, -0.999, -0.996, 0.0, 0.996, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 128, 254, 255, 255]


LDM = {
    r"down_blocks\.(\d)\.resnets\.(\d)": r"down.\1.block.\2",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.(\d)\.resnets\.(\d)": lambda m: f"up.{3 - int(m[1])}.block.{m[2]}",
    r"up_blocks\.(\d)\.upsamplers\.0": lambda m: f"up.{3 - int(m[1])}.upsample",
    r"mid_block\.resnets\.(\d)": lambda m: f"mid.block_{int(m[1]) + 1}",
    r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
    r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
    r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
}


def in_stable_diffusions_own_layout(tensors):
    renamed = {}
    for name, tensor in tensors.items():
        is_attention = "attentions.0.to_" in name and name.endswith("weight")
        for pattern, replacement in LDM.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor[:, :, None, None] if is_attention else tensor
    return renamed


def vae_codec(source, **options):
    return build(section("codec", name="vae", vae=str(source), **options), 16)


def test_a_vae_from_a_folder_or_one_file_is_the_same(vae, tmp_path):
    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    ldm = in_stable_diffusions_own_layout(tensors)
    save_file(tensors, tmp_path / "vae.safetensors")
    torch.save(tensors, tmp_path / "vae.pt")
    save_file({k: v.contiguous() for k, v in ldm.items()}, tmp_path / "ldm.safetensors")
    torch.save(
        {"state_dict": {f"first_stage_model.{k}": v for k, v in ldm.items()}}, tmp_path / "ldm.ckpt"
    )
    packed, whole = images(2, 16), vae_codec(vae)
    for name in ("vae.safetensors", "vae.pt", "ldm.safetensors", "ldm.ckpt"):
        one = vae_codec(tmp_path / name, vae_config=str(vae))
        torch.testing.assert_close(one.pack(packed), whole.pack(packed))
        assert one.identity()["sha256"] == whole.identity()["sha256"]


def test_a_vae_file_that_lacks_tensors_or_is_another_one_is_refused(vae, tmp_path):
    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(
        MsmdiffError, match=r"lacks 1 of the network's tensors, such as encoder.conv_in.bias"
    ):
        vae_codec(tmp_path / "vae.safetensors", vae_config=str(vae)).pack(images(1, 16))
    with pytest.raises(
        MsmdiffError, match=r"cannot be loaded as an AutoencoderKL: .*size mismatch"
    ):
        # Not of Stable Diffusion's sizes.
        vae_codec(tmp_path / "vae.safetensors").pack(images(1, 16))
    torch.save({"a": print}, tmp_path / "evil.pt")
    with pytest.raises(MsmdiffError, match="cannot be loaded"):
        vae_codec(tmp_path / "evil.pt").pack(images(1, 16))


def test_a_vae_of_another_kind_or_none_is_refused(vae):
    with pytest.raises(
        UsageError,
        match=r"makes 4 channels at a factor of 8: set codec.channels=4 and codec.factor=8",
    ):
        vae_codec(vae, channels=16).pack(images(1, 16))
    with pytest.raises(UsageError, match=r"--set codec.vae=FOLDER"):
        build(section("codec", name="vae"), 16).pack(images(1, 16))


def test_latents_are_normalised_per_channel_and_come_back(vae):
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    codec, plain = vae_codec(vae, mean=mean, std=std, scale=0.5), vae_codec(vae, scale=1.0)
    packed = plain.pack(images(2, 16))
    z = codec.encode(packed, torch.Generator().manual_seed(1))
    raw = plain.encode(packed, torch.Generator().manual_seed(1))
    per_channel = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    torch.testing.assert_close(z, 0.5 * (raw - next(per_channel)) / next(per_channel))
    assert (codec.decode(z).int() - plain.decode(raw).int()).abs().max() <= 1
    with pytest.raises(UsageError, match=r"codec.mean has 1 numbers; the latents have 4 channels"):
        vae_codec(vae, mean=[1.0], std=[1.0])


def test_a_vae_runs_in_bf16_and_in_tiles(vae):
    packed = images(1, 64)
    expected = build(section("codec", name="vae", vae=str(vae)), 64).pack(packed)
    half = build(section("codec", name="vae", vae=str(vae), precision="bf16"), 64).pack(packed)
    assert half.dtype == torch.float32
    assert 0 < (half - expected).abs().max() < 0.1
    tiled = build(section("codec", name="vae", vae=str(vae), tile=True), 64).pack(packed)
    assert tiled.shape == expected.shape
    assert 0 < (tiled - expected).abs().mean() < expected.abs().mean()


def test_numbers_that_are_not_finite_do_not_become_black_images():
    codec = build(section("codec"), 8)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(MsmdiffError, match="decoding gave numbers that are not finite"):
            codec.decode(torch.full((1, 3, 8, 8), bad))


def test_a_vae_that_encodes_to_nan_is_named(vae):
    codec = vae_codec(vae)
    codec.load()
    codec.network.quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(MsmdiffError, match=r"codec.vae .*vae encodes images to numbers that are"):
        codec.encode(images(1, 16))


def test_thresholding_is_for_pixels():
    layers = {"model": {"name": "tiny", "num_classes": 0}, "sample": {"threshold": 0.995}}
    assert road.resolve(configuration.build(layers)).sample.threshold == 0.995
    for codec in ("dwt", "vae"):
        with pytest.raises(UsageError, match=f"threshold 0.995 is for pixels.* codec {codec}"):
            road.resolve(
                configuration.build(layers, {"codec": {"name": codec}, "data": {"image_size": 64}})
            )


def test_another_vae_than_the_latents_were_made_with_is_refused(vae, tmp_path):
    made_with = vae_codec(vae).identity()["sha256"]
    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_in.bias"] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    other = {"source": tmp_path / "other.safetensors", "vae_config": str(vae)}
    vae_codec(vae, vae_sha256=made_with).load()
    with pytest.raises(UsageError, match="is not the VAE that the latents were made with"):
        vae_codec(**other, vae_sha256=made_with).load()
    vae_codec(**other, vae_sha256="any").load()
