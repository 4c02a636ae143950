import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from msmdiff.core.data.sources import Digits
from msmdiff.core.diffusion.codecs import DwtCodec, PixelCodec, to_uint8, to_unit

WAVELETS = ["haar", "db2", "db4", "sym5", "coif1", "bior1.3", "bior4.4", "rbio3.1", "bior3.9"]


def images(n=4, size=32, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), np.uint8))


def oracle(x, wavelet, level):
    approximation, *details = pywt.wavedec2(x.double().numpy(), wavelet, mode="periodization", level=level)
    folded = [F.pixel_unshuffle(torch.from_numpy(b), 2**i) for i, bands in enumerate(details) for b in bands]
    return torch.cat([torch.from_numpy(approximation), *folded], 1)


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_dwt_equals_pywavelets_and_inverts(wavelet, level):
    codec, x = DwtCodec(32, wavelet, level), to_unit(images())
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
    codec = DwtCodec(32, wavelet, level)
    mean, std = codec.measure([packed])
    for each in (PixelCodec(32), codec, DwtCodec(32, wavelet, level, mean, std)):
        assert torch.equal(each.decode(each.encode(each.pack(packed))), packed)


def test_measured_statistics_give_unit_bands():
    source = Digits()
    pixels = np.stack([np.asarray(source.read(i).resize((16, 16))) for i in range(300)])
    packed = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    mean, std = DwtCodec(16, level=2).measure(packed.split(64))
    z = DwtCodec(16, "haar", 2, mean, std).encode(packed)
    for band in z.split([3, 3, 3, 3, 12, 12, 12], dim=1):
        assert abs(band.mean()) < 1e-4
        assert abs(band.std() - 1) < 1e-3
    assert torch.equal(to_uint8(to_unit(packed)), packed)


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
def test_clip_leaves_real_images_alone_and_bounds_the_rest(wavelet):
    packed = images(8)
    packed[0], packed[1] = 0, 255
    mean, std = DwtCodec(32, wavelet, 2).measure([packed])
    codec = DwtCodec(32, wavelet, 2, mean, std)
    z = codec.encode(packed)
    assert torch.allclose(codec.clip(z), z, atol=1e-5)
    wild = codec.clip(z * 1000)
    assert wild.abs().max() < z.abs().max() * 200
    assert torch.equal(PixelCodec(8).clip(torch.tensor([-3.0, 0.5, 2.0])), torch.tensor([-1.0, 0.5, 1.0]))


def test_uint8_rounds_and_clamps():
    x = torch.tensor([-2.0, -1.0, -0.999, -0.996, 0.0, 0.996, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 128, 254, 255, 255]
