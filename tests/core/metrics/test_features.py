"""Networks and resizing rules, against the projects they are named for."""

import hashlib
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core import hub
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import dinov2, features, inception
from msmdiff.core.metrics.dinov2 import DinoFeatures
from msmdiff.core.metrics.features import PixelFeatures
from msmdiff.core.metrics.inception import RESIZES, InceptionFeatures

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 32, 40), np.uint8))


def test_pixel_features_are_area_means():
    image = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    image[0, 1, :2, :3] = 255
    got = PixelFeatures()(image)[0].view(3, 8, 8)
    assert got[1, 0, 0] == 1
    assert (got.flatten().sort().values[:-1] == -1).all()
    with pytest.raises(UsageError, match="at least 8x8"):
        PixelFeatures()(torch.zeros(1, 3, 4, 16, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(32, 40), (400, 350), (299, 299)])
def test_the_clean_rule_is_pillows_bicubic_in_float(shape):
    """clean-fid resizes every channel as a float image, so that nothing is rounded, and clips."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((299, 299), Image.BICUBIC)
        for c in range(3)
    ]
    expected = np.stack([np.asarray(c).clip(0, 255) for c in channels])
    got = RESIZES["clean"](torch.from_numpy(image).permute(2, 0, 1)[None], 299)[0]
    # Of 255; torch keeps its weights in float32.
    np.testing.assert_allclose(got * 128 + 128, expected, atol=1e-2)


def test_the_adm_rule_is_tensorflow_1s():
    """Output i is read at i x in / out: the first pixel is kept, and the last output lies short of
    the last pixel.
    """
    ramp = torch.arange(4, dtype=torch.uint8).mul(64).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    got = RESIZES["adm"](ramp, 8)[0, 0, 0] * 128 + 128
    assert got.tolist() == [0, 32, 64, 96, 128, 160, 192, 192]
    half_pixel = (RESIZES["pytorch-fid"](ramp, 8)[0, 0, 0] + 1) * 127.5
    torch.testing.assert_close(half_pixel, torch.tensor([0.0, 16, 48, 80, 112, 144, 176, 192]))
    torch.testing.assert_close(RESIZES["adm"](ramp.mT, 8), RESIZES["adm"](ramp, 8).mT)


def test_inception_features_equal_pytorch_fids(random_inception):
    from pytorch_fid import inception

    features = InceptionFeatures(random_inception, spatial=True)
    got, spatial = features(IMAGES)
    state = torch.load(random_inception, weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        theirs = inception.InceptionV3([3]).eval()
    seen = []
    theirs.blocks[2][6].register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        expected = theirs(IMAGES / 255)[0].flatten(1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # mixed_6's first seven channels are those of its first branch; ADM flattens them channels last.
    torch.testing.assert_close(
        spatial, seen[0][:, :7].permute(0, 2, 3, 1).flatten(1), rtol=1e-4, atol=1e-4
    )
    assert spatial.shape == (3, features.spatial_width) == (3, 2023)
    logits = torch.nn.functional.linear(got, state["fc.weight"]).double()
    torch.testing.assert_close(features.probabilities(got), logits.softmax(1), rtol=1e-5, atol=1e-8)
    assert "not the published ones" in features.title
    assert features.name.endswith(hashlib.sha256(random_inception.read_bytes()).hexdigest()[:8])
    half, _ = InceptionFeatures(random_inception, precision="bf16")(IMAGES)
    assert half.dtype == torch.float32
    assert 0 < (half - got).abs().max() < 0.1 * got.abs().max()
    other, _ = InceptionFeatures(random_inception, resize="adm")(IMAGES)
    assert (other - got).abs().max() > 1e-3


def test_missing_or_wrong_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("MSMDIFF_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub, "require", lambda url: None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        MsmdiffError,
        match=r"pt_inception-2015-12-05-6726825d.pth \(sha256 6726825d.*--weights FILE",
    ):
        InceptionFeatures(None)
    cached = tmp_path / "hub" / "checkpoints" / inception.INCEPTION_FILE
    cached.write_bytes(b"torn")
    for given in (None, cached):
        with pytest.raises(
            MsmdiffError, match=f"{cached} has sha256 .* not 6726825d.*: it is damaged"
        ):
            InceptionFeatures(given)
    ours = tmp_path / "ours" / inception.INCEPTION_FILE
    ours.parent.mkdir()
    ours.write_bytes(b"torn as well")
    with pytest.raises(MsmdiffError, match=f"{ours} has sha256"):
        InceptionFeatures(None)
    with pytest.raises(MsmdiffError, match="does not hold pytorch-fid's Inception weights"):
        InceptionFeatures(cached.rename(tmp_path / "other.pth"))
    with pytest.raises(MsmdiffError, match=r"nothere\.pth does not exist"):
        InceptionFeatures(tmp_path / "nothere.pth")


SMALL = "vit_small_patch14_dinov2.lvd142m"


def test_dino_reads_the_published_layout_and_shrinks_its_positions(tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model(SMALL, num_classes=0)
    state = network.state_dict() | {"mask_token": torch.zeros(1, 384)}
    state["pos_embed"].normal_()
    torch.save(state, tmp_path / "small.pth")
    features = DinoFeatures(tmp_path / "small.pth", model=SMALL)
    got, none = features(IMAGES)
    assert (got.shape, none, features.width, features.resize) == ((3, 384), None, 384, "clean")
    assert features.name.startswith("vit_small_patch14_dinov2/")
    assert SMALL in features.title
    table = dinov2._positions(state["pos_embed"], 16)
    assert table.shape == (1, 257, 384)
    torch.testing.assert_close(table[:, 0], state["pos_embed"][:, 0])
    flat = dinov2._positions(torch.ones(1, 1370, 2), 16)
    torch.testing.assert_close(flat, torch.ones(1, 257, 2))
    # Its offset of 0.1 takes output i from (i + 1/2) 37 / 16.1 - 1/2: on a ramp about that number,
    # and without the offset up to 0.2 more.
    ramp = torch.cat([torch.zeros(1, 1, 1), torch.arange(37.0).repeat(37).view(1, -1, 1)], 1)
    places = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    torch.testing.assert_close(
        dinov2._positions(ramp, 16)[0, 1:17, 0][1:-1], places[1:-1], rtol=0, atol=0.06
    )
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, tmp_path / "part.pth")
    with pytest.raises(
        MsmdiffError, match=r"part.pth cannot be used as vit_small.*norm.weight.*--dinov2-weights"
    ):
        DinoFeatures(tmp_path / "part.pth", model=SMALL)
    with pytest.raises(MsmdiffError, match=r"none.pth cannot be used.*does not exist"):
        DinoFeatures(tmp_path / "none.pth", model=SMALL)


def test_settings_that_features_do_not_have_are_refused():
    for more in (
        {"resize": "adm"},
        {"precision": "bf16"},
        {"metrics": {"sfid"}},
        {"metrics": {"is"}},
    ):
        with pytest.raises(UsageError, match="no effect on --features pixel"):
            features.build("pixel", **more)


@pytest.mark.gpu
def test_a_gpu_gives_the_features_of_the_cpu(random_inception):
    here, there = (
        InceptionFeatures(random_inception, device, spatial=True)(IMAGES)
        for device in ("cpu", "cuda")
    )
    for one, two in zip(here, there, strict=True):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-3, atol=1e-3)
