import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import evaluate, statistics
from msmdiff.core.metrics.features import InceptionFeatures, PixelFeatures
from msmdiff.core.metrics.frechet import frechet_distance
from msmdiff.core.metrics.statistics import Moments

RNG = np.random.default_rng(0)


def covariance(d, rank=None):
    a = RNG.normal(size=(d, rank or 2 * d))
    return a @ a.T / a.shape[1]


def test_published_distances(golden):
    case = json.loads((golden / "metrics" / "case.json").read_text())
    features = load_file(golden / "metrics" / "io.safetensors")
    assert case["frechet"]
    for name, expected in case["frechet"].items():
        a, b = features[f"{name}/ref"], features[f"{name}/gen"]
        got = frechet_distance(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
        tolerance = expected["tolerance"]
        assert abs(got - expected["exact"]) <= tolerance["atol"] + tolerance["rtol"] * expected["exact"], name


def test_diagonal_covariances_have_a_closed_form():
    m1, m2 = RNG.normal(size=(2, 6))
    s1, s2 = RNG.uniform(0.1, 3, size=(2, 6))
    expected = np.square(m1 - m2).sum() + np.square(s1 - s2).sum()
    assert frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("rank", [None, 3])
def test_distance_to_itself_symmetry_and_rotation(rank):
    m1, m2 = RNG.normal(size=(2, 20))
    c1, c2 = covariance(20, rank), covariance(20)
    assert frechet_distance(m1, c1, m1, c1) < 1e-3
    there = frechet_distance(m1, c1, m2, c2)
    assert there == pytest.approx(frechet_distance(m2, c2, m1, c1), rel=1e-6)
    q, _ = np.linalg.qr(RNG.normal(size=(20, 20)))
    assert there == pytest.approx(frechet_distance(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T), rel=1e-6)


def test_streaming_moments_equal_numpy_even_far_from_zero():
    x = RNG.normal(size=(103, 7)) + 1e6
    moments = Moments(7)
    for part in np.split(x, [1, 2, 50, 99]):
        moments.add(part)
    got = moments.statistics()
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    assert got.count == 103
    with pytest.raises(MsmdiffError, match="at least two images"):
        Moments(7).statistics()


def test_statistics_files_keep_everything_and_are_pytorch_fids(tmp_path):
    stats = statistics.Statistics(RNG.normal(size=4), covariance(4), 10, "pixel-8x8")
    statistics.save(tmp_path / "new" / "s.npz", stats)
    again = statistics.load(tmp_path / "new" / "s.npz")
    assert np.array_equal(again.cov, stats.cov)
    assert (again.count, again.features) == (10, "pixel-8x8")
    assert set(np.load(tmp_path / "new" / "s.npz")) >= {"mu", "sigma"}
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    assert statistics.load(tmp_path / "images.npz") is None
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UsageError, match="do not belong together"):
        statistics.load(tmp_path / "bad.npz")


def test_pixel_features_are_area_means():
    image = torch.zeros(1, 3, 16, 24, dtype=torch.uint8)
    image[0, 1, :2, :3] = 255
    got = PixelFeatures()(image).view(3, 8, 8)
    assert got[1, 0, 0] == 1
    assert (got.flatten().sort().values[:-1] == -1).all()
    with pytest.raises(UsageError, match="at least 8x8"):
        PixelFeatures()(torch.zeros(1, 3, 4, 16, dtype=torch.uint8))


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """pytorch-fid's network with seeded He-initialised weights, saved in its own layout."""
    from unittest import mock

    from pytorch_fid import inception

    torch.manual_seed(0)
    build = inception._inception_v3

    holder = {}

    def keep_default(url, **kwargs):
        return holder["net"].state_dict()

    def remember(*args, **kwargs):
        holder["net"] = build(*args, **kwargs)
        return holder["net"]

    with (
        mock.patch.object(inception, "_inception_v3", remember),
        mock.patch.object(inception, "load_state_dict_from_url", keep_default),
    ):
        net = inception.fid_inception_v3()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_features_equal_pytorch_fids(random_inception):
    from unittest import mock

    from pytorch_fid import inception

    images = torch.from_numpy(RNG.integers(0, 256, (3, 3, 32, 40), np.uint8))
    features = InceptionFeatures(random_inception)
    got = features(images)
    state = torch.load(random_inception, weights_only=True)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        theirs = inception.InceptionV3([3]).eval()
    with torch.no_grad():
        expected = theirs(images / 255)[0].flatten(1)
    assert got.shape == (3, 2048)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert "not the published ones" in features.title


def test_missing_or_wrong_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(MsmdiffError, match=r"pt_inception-2015-12-05-6726825d.pth \(sha256 6726825d.*--weights FILE"):
        InceptionFeatures(None)
    cached = tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth"
    cached.write_bytes(b"torn")
    with pytest.raises(MsmdiffError, match="it is damaged"):
        InceptionFeatures(None)
    with pytest.raises(MsmdiffError, match="does not hold pytorch-fid's Inception weights"):
        InceptionFeatures(cached)
    with pytest.raises(MsmdiffError, match=r"nothere\.pth does not exist"):
        InceptionFeatures(tmp_path / "nothere.pth")


def test_mixed_sizes_and_unreadable_files_are_named(photos):
    from PIL import Image

    Image.new("RGB", (41, 24)).save(photos / "zebra.png")
    with pytest.raises(MsmdiffError, match=r"mixes sizes: zebra\.png is 41x24, the first is 40x24"):
        evaluate.of_source(str(photos), PixelFeatures())
    (photos / "zebra.png").write_bytes(b"x")
    with pytest.raises(MsmdiffError, match=r"1 of 13 images .* the first is zebra.png"):
        evaluate.of_source(str(photos), PixelFeatures())
