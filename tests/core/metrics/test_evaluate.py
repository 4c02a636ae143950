"""From files to statistics and scores."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core import registry
from msmdiff.core.data.sources import Files
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import evaluate, inception, inputs, statistics
from msmdiff.core.metrics.evaluate import Settings
from msmdiff.core.metrics.features import PixelFeatures
from msmdiff.core.metrics.frechet import Gaussian, frechet_distance
from msmdiff.core.metrics.statistics import Moments, Statistics

RNG = np.random.default_rng(0)


def pictures(folder, count, size=(24, 24), seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:03d}.png")
    return str(folder)


def test_streaming_moments_equal_numpy_even_far_from_zero():
    x = RNG.normal(size=(103, 7)) + 1e6
    moments = Moments(7)
    for part in np.split(x, [1, 2, 50, 99]):
        moments.add(torch.from_numpy(part))
    got, rows = moments.finish()
    np.testing.assert_allclose(got.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(got.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9)
    assert (moments.count, got.root, rows) == (103, None, None)
    with pytest.raises(MsmdiffError, match="at least two images"):
        Moments(7).finish()


@pytest.mark.parametrize("keep_rows", [False, True])
def test_features_are_kept_while_few_or_when_asked(keep_rows):
    x = torch.from_numpy(RNG.normal(size=(9, 4))).float()
    moments = Moments(4, keep_rows=keep_rows)
    moments.add(x[:4])
    few, rows = moments.finish()
    assert few.root is not None
    torch.testing.assert_close(few.root.T @ few.root, few.cov)
    torch.testing.assert_close(rows, x[:4])
    moments.add(x[4:])
    many, rows = moments.finish()
    assert many.root is None
    assert (rows is not None) == keep_rows
    torch.testing.assert_close(many.cov, Gaussian.fit(x).cov)


def test_statistics_files_keep_everything_and_are_pytorch_fids(tmp_path):
    x = torch.from_numpy(RNG.normal(size=(3, 4))).float()
    known = {
        "features": "pixel-8x8",
        "resize": "area",
        "precision": "fp32",
        "image_size": "8x8",
        "crop": "adm 8",
    }
    stats = Statistics(Gaussian.fit(x), 3, known, Gaussian.fit(x[:, :2]), x)
    statistics.save(tmp_path / "new" / "s.npz", stats)
    again = statistics.load(tmp_path / "new" / "s.npz")
    assert torch.equal(again.pooled.cov, stats.pooled.cov)
    assert torch.equal(again.pooled.root, stats.pooled.root)
    assert torch.equal(again.spatial.mean, stats.spatial.mean)
    assert (again.count, again.settings, again.assumed) == (3, known, False)
    assert set(np.load(tmp_path / "new" / "s.npz")) >= {"mu", "sigma", "mu_s", "sigma_s", "rows"}
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    assert statistics.load(tmp_path / "images.npz") is None
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UsageError, match="do not belong together"):
        statistics.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "nan.npz", mu=np.zeros(2), sigma=np.full((2, 2), np.nan))
    with pytest.raises(UsageError, match="not finite"):
        statistics.load(tmp_path / "nan.npz")


def test_files_that_do_not_say_are_known_by_their_layout(tmp_path):
    wide = dict(mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    np.savez(tmp_path / "fid_stats.npz", **wide)
    found = statistics.load(tmp_path / "fid_stats.npz")
    assert found.settings == {"features": "inception-2048/6726825d", "resize": "pytorch-fid"}
    assert (found.assumed, found.count) == (True, 0)
    np.savez(
        tmp_path / "adm.npz",
        **wide,
        mu_s=np.zeros(5),
        sigma_s=np.eye(5),
        arr_0=np.zeros((3, 8, 8, 3), np.uint8),
    )
    opened = inputs.open_input(str(tmp_path / "adm.npz"))
    assert opened.stored.settings["resize"] == "adm"
    assert opened.stored.spatial.mean.shape == (5,)
    assert len(opened) == 3
    assert evaluate.check(opened, opened, PixelFeatures()) == ""  # its images serve other features
    assert evaluate.of_input(opened, PixelFeatures()).count == 3


def test_unequal_rules_are_refused_unless_asked_for(tmp_path, monkeypatch):
    a, b = pictures(tmp_path / "a", 4), str(tmp_path / "b.npz")
    small = inputs.Stored(Files(pictures(tmp_path / "small", 4, (16, 16)), "none"))
    # Averages over areas: any size will do.
    (scores,), _, _ = evaluate.evaluate([a], small.spec, Settings(features="pixel"))
    assert scores[0].value > 0
    monkeypatch.setattr(PixelFeatures, "resize", "some-rule")
    statistics.save(tmp_path / "b.npz", evaluate.of_input(small, PixelFeatures()))
    with pytest.raises(
        UsageError,
        match=r"differs from .*b.npz in image_size 24x24 against 16x16: --allow-mismatch",
    ):
        evaluate.evaluate([a], b, Settings(features="pixel"))
    with pytest.raises(UsageError, match="image_size 24x24 against 16x16"):
        evaluate.evaluate([a], small.spec, Settings(features="pixel"))
    notes = []
    (scores,), _, _ = evaluate.evaluate(
        [a], b, Settings(features="pixel", allow_mismatch=True, note=notes.append)
    )
    assert scores[0].value > 0
    assert "image_size 24x24 against 16x16; compared all the same" in notes[0]
    (scores,), _, passes = evaluate.evaluate([a], small.spec, Settings(features="pixel"), crop=16)
    assert passes[0].sets[0].settings["crop"] == "adm 16"
    (tmp_path / "c.npz").write_bytes((tmp_path / "b.npz").read_bytes())
    other = statistics.load(tmp_path / "c.npz")
    other.settings["features"], other.rows = "pixel-9x9", None
    statistics.save(tmp_path / "c.npz", other)
    with pytest.raises(UsageError, match="features pixel-8x8 against pixel-9x9"):
        evaluate.evaluate([small.spec], str(tmp_path / "c.npz"), Settings(features="pixel"))
    with pytest.raises(UsageError, match="holds statistics only"):
        evaluate.evaluate(
            [small.spec],
            str(tmp_path / "c.npz"),
            Settings(metrics=["kid"], features="pixel", allow_mismatch=True),
        )
    np.savez(tmp_path / "d.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(
        UsageError, match=r"holds statistics of 3 unnamed features, .* pixel-8x8 \(192\)"
    ):
        evaluate.evaluate([a], str(tmp_path / "d.npz"), Settings(features="pixel"))


def test_kept_features_serve_kid_and_prdc_from_a_file(tmp_path):
    a, b = pictures(tmp_path / "a", 30), pictures(tmp_path / "b", 25, seed=1)
    metrics = ["fid", "kid", "prdc"]
    (direct,), _, passes = evaluate.evaluate(
        [a], b, Settings(metrics=metrics, features="pixel", bootstrap=4)
    )
    statistics.save(tmp_path / "b.npz", passes[0].sets[-1])
    (stored,), _, _ = evaluate.evaluate(
        [a], str(tmp_path / "b.npz"), Settings(metrics=metrics, features="pixel", bootstrap=4)
    )
    assert [s.value for s in stored] == pytest.approx([s.value for s in direct], rel=1e-12)
    assert stored[0].interval == pytest.approx(direct[0].interval, rel=1e-9)
    assert [s.name for s in direct] == [
        "fd_pixel",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
    ]
    low, high = direct[0].interval
    assert 0 <= low < direct[0].value < high


def test_a_picture_of_statistics_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    a = pictures(tmp_path / "a", 3)
    _, _, (made,) = evaluate.evaluate([a], None, Settings(features="pixel"))
    # So few that they are kept, which serves everything but a picture.
    assert made.sets[0].rows is not None
    statistics.save(tmp_path / "b.npz", made.sets[0])
    monkeypatch.setattr(evaluate, "of_input", None)
    with pytest.raises(UsageError, match=r"--plot shows images: .*b\.npz holds statistics only"):
        evaluate.evaluate([a], str(tmp_path / "b.npz"), Settings(features="pixel", keep_rows=True))


def test_two_files_of_statistics_need_no_network(tmp_path, monkeypatch):
    """Neither its weights, nor a place to look for them."""
    monkeypatch.setattr(inception, "_published_weights", lambda: pytest.fail("looked for weights"))
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        root = rng.normal(size=(8, 2048))
        np.savez(tmp_path / f"{name}.npz", mu=rng.normal(size=2048), sigma=root.T @ root)
    a, b = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    (scores,), _, passes = evaluate.evaluate([a], b)
    one, two = (statistics.load(Path(spec)).pooled for spec in (a, b))
    assert scores[0].value == frechet_distance(one, two)
    assert (scores[0].name, scores[0].title) == ("fid", "FID")
    assert passes[0].features.settings()["resize"] == "pytorch-fid"
    with pytest.raises(UsageError, match="holds no spatial statistics"):
        evaluate.evaluate([a], b, Settings(metrics=["fid", "sfid"]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"sigma": np.triu(np.ones((192, 192)))}, "sigma is not symmetric"),
        ({"sigma": np.diag([-1.0, *[1.0] * 191])}, "sigma has negative variances"),
        ({"sigma": np.full((192, 192), np.nan)}, "holds numbers that are not finite"),
        ({"rows": np.full((3, 192), np.nan, np.float32)}, "holds numbers that are not finite"),
        ({"rows": np.zeros((3, 5), np.float32)}, r"rows \[3, 5\] of float32 are not"),
        ({"count": np.array("many")}, "not an archive of statistics that can be read"),
        ({}, "192 unnamed features, which may be others than pixel-8x8"),
    ],
)
def test_statistics_that_are_none_are_named(tmp_path, content, words):
    np.savez(tmp_path / "a.npz", **{"mu": np.zeros(192), "sigma": np.eye(192), **content})
    spec = str(tmp_path / "a.npz")
    with pytest.raises(MsmdiffError, match=rf"a.npz.*{words}"):
        evaluate.evaluate([spec], spec, Settings(features="pixel"))


def test_an_image_whose_features_are_not_finite_is_named(tmp_path, monkeypatch):
    path = pictures(tmp_path / "a", 4)
    measure = PixelFeatures.__call__

    def broken(self, images):
        vectors, _ = measure(self, images)
        vectors[2, 5] = torch.nan
        return vectors, None

    monkeypatch.setattr(PixelFeatures, "__call__", broken)
    names = [p.name for p in sorted((tmp_path / "a").iterdir())]
    with pytest.raises(MsmdiffError, match=rf"pixel-8x8 features of .*{names[2]} are not finite"):
        evaluate.evaluate([str(path)], str(path), Settings(features="pixel"))


def test_the_rule_of_given_statistics_is_taken_over(tmp_path, random_inception):
    """And ADM's are taken for what its evaluator makes, so that other weights are told apart."""
    a, ref = pictures(tmp_path / "a", 3), str(tmp_path / "ref.npz")
    _, _, (made,) = evaluate.evaluate(
        [a],
        None,
        Settings(metrics=["sfid"], weights=random_inception, feature_options={"resize": "clean"}),
    )
    assert made.sets[0].spatial.mean.shape == (2023,)
    statistics.save(tmp_path / "ref.npz", made.sets[0])
    (scores,), _, (again,) = evaluate.evaluate(
        [a], ref, Settings(metrics=["fid", "sfid"], weights=random_inception)
    )
    assert again.features.resize == "clean"
    assert [s.name for s in scores] == ["fid", "sfid"]
    assert max(s.value for s in scores) < 1e-3
    with pytest.raises(UsageError, match="resize adm against clean"):
        evaluate.evaluate(
            [a], ref, Settings(weights=random_inception, feature_options={"resize": "adm"})
        )
    made.sets[0].settings = {}
    statistics.save(tmp_path / "ref.npz", made.sets[0])
    with pytest.raises(
        UsageError, match=r"features inception-2048/\w+ against inception-2048/6726825d"
    ):
        evaluate.evaluate([a], ref, Settings(weights=random_inception))
    notes = []
    evaluate.evaluate(
        [a], ref, Settings(weights=random_inception, allow_mismatch=True, note=notes.append)
    )
    assert (
        "does not say how it was made; going by its layout: inception-2048/6726825d, adm"
        in notes[1]
    )


def test_mixed_sizes_and_unreadable_files_are_named(tmp_path):
    folder = pictures(tmp_path / "a", 150)
    Image.new("RGB", (41, 24)).save(tmp_path / "a" / "zebra.png")
    for workers in (0, 1):
        opened = inputs.Stored(Files(folder, "none"), workers=workers)
        with pytest.raises(
            MsmdiffError, match=r"mixes sizes: zebra\.png is 41x24, the first is 24x24"
        ):
            evaluate.of_input(opened, PixelFeatures())
    (tmp_path / "a" / "zebra.png").write_bytes(b"x")
    good = inputs.Stored(Files(folder, "none"), workers=1)
    assert evaluate.of_input(good, PixelFeatures()).count == 150
    notes = []
    evaluate.evaluate(
        [folder], pictures(tmp_path / "b", 3), Settings(features="pixel", note=notes.append)
    )
    assert notes == [f"left out: 1 of 151 images in {folder}: zebra.png ({good.bad[150]})"]
    for name in ("000", "001"):
        (tmp_path / "a" / f"{name}.png").write_bytes(b"y")
    with pytest.raises(
        MsmdiffError,
        match=r"3 of 151 images in .* cannot be read, more than 1%, the first is 000.png",
    ):
        inputs.Stored(Files(folder, "none"))


def test_a_name_is_a_runs_only_where_no_data_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits:test", "faces", "real"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    pictures(tmp_path / "real", 3)
    names = ("digits", "digits:test", "faces", "real", "runs/real")
    assert [name for name in names if inputs.draws(name)] == ["faces", "runs/real"]
    assert len(inputs.open_input("digits")) == 1797


def test_sets_that_are_no_sets(tmp_path):
    one = pictures(tmp_path / "one", 1)
    with pytest.raises(UsageError, match="holds 1 image: a distance needs at least two"):
        evaluate.evaluate([one], one, Settings(features="pixel"))
    outer = pictures(tmp_path / "outer", 3)
    inner = pictures(tmp_path / "outer" / "inner", 3)
    for a, b in ((outer, inner), (inner, outer)):
        with pytest.raises(UsageError, match="lies in the other"):
            evaluate.evaluate([a], b, Settings(features="pixel"))
    notes = []
    evaluate.evaluate([inner], f"{inner}/../inner", Settings(features="pixel", note=notes.append))
    assert "note: both sides are the same, " in notes[0]
    with pytest.raises(
        UsageError, match="--metrics 'fud' is none of the metrics; did you mean 'fid'"
    ):
        evaluate.evaluate([outer], outer, Settings(metrics=["fud"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": "pixels"}, "--features 'pixels' is none of .* did you mean 'pixel'"),
        (
            {"metric_options": {"kid_size": 5}},
            "metric.kid_size has no effect on --metrics fid",
        ),
        (
            {"metrics": ["kid"], "metric_options": {"kid_sise": 5}},
            "metric.kid_sise has no effect on --metrics kid; did you mean 'kid_size'",
        ),
        (
            {"metrics": ["kid"], "metric_options": {"kid_size": 1}},
            "metric.kid_size = 1: input should be greater than or equal to 2",
        ),
        (
            {"feature_options": {"resize": "adm"}},
            "features.resize = adm has no effect on --features pixel",
        ),
        (
            {"features": "inception", "feature_options": {"resize": "bicubic"}},
            "features.resize = 'bicubic': input should be 'pytorch-fid', 'clean' or 'adm'",
        ),
        ({"metrics": ["sfid"]}, "are for --features inception: pixel has no spatial"),
    ],
)
def test_wrong_names_and_options_are_refused_before_anything_is_measured(
    tmp_path, settings, message, monkeypatch
):
    a, b = pictures(tmp_path / "a", 3), pictures(tmp_path / "b", 3, seed=1)
    monkeypatch.setattr(evaluate, "of_input", None)
    with pytest.raises(UsageError, match=message):
        evaluate.evaluate([a], b, Settings(**{"features": "pixel", **settings}))


def test_options_change_the_published_metrics(tmp_path):
    a, b = pictures(tmp_path / "a", 9), pictures(tmp_path / "b", 7, seed=1)
    chosen = Settings(metrics=["prdc", "kid"], features="pixel")
    (plain,), _, _ = evaluate.evaluate([a], b, chosen)
    chosen.metric_options = {"kid_subsets": 2, "kid_size": 5, "prdc_k": 1}
    (other,), _, _ = evaluate.evaluate([a], b, chosen)
    before, after = ({score.name: score.value for score in found} for found in (plain, other))
    assert list(before) == ["kid", "precision", "recall", "density", "coverage"]
    assert after["kid"] != before["kid"]
    assert after["precision"] < before["precision"]
    assert after["density"] == before["density"]


@pytest.fixture
def small_dino(monkeypatch):
    """Something in DINOv2's place that needs no weights; remembers which it was given."""

    class Colours(PixelFeatures):
        """Mean colours."""

        name, width, metric, prefix = "vit_large_patch14_dinov2/0", 3, "fd_dinov2", "vit_"
        given: ClassVar = []

        def __init__(self, weights=None, device="cpu", *, spatial=False):
            self.given.append(weights)

        def __call__(self, images):
            return images.float().mean((2, 3)), None

    known = registry.entries("features")
    monkeypatch.setitem(known, "dinov2", replace(known["dinov2"], make=Colours))
    return Colours


def test_the_first_score_is_the_same_whichever_way_the_metrics_are_named(tmp_path, small_dino):
    a, b = pictures(tmp_path / "a", 9), pictures(tmp_path / "b", 7, seed=1)
    chosen = Settings(metrics=["fd_dinov2", "kid", "fid"], features="pixel")
    (found,), _, passes = evaluate.evaluate([a], b, chosen)
    assert [score.name for score in found] == ["fd_pixel", "kid", "fd_dinov2"]
    assert [each.features.width for each in passes] == [192, 3]


def test_dinov2_takes_either_files_option(tmp_path, small_dino):
    a, b = pictures(tmp_path / "a", 9), pictures(tmp_path / "b", 7, seed=1)
    for given in ({"weights": Path("w")}, {"dinov2_weights": Path("w")}):
        chosen = Settings(metrics=["kid", "fd_dinov2", "fid"], features="dinov2", **given)
        (found,), _, passes = evaluate.evaluate([a], b, chosen)
        assert [score.name for score in found] == ["fd_dinov2", "kid"]
        assert len(passes) == 1
    assert small_dino.given == [Path("w")] * 2


def test_transparency_is_left_out_as_the_peers_do_unless_images_are_read_as_in_training(tmp_path):
    for i in range(2):
        Image.new("RGBA", (8, 8), (10 * i, 20, 30, 0)).save(tmp_path / f"{i}.png")
    for crop, alpha, pixel in ((None, "drop", [10, 20, 30]), (8, "white", [255, 255, 255])):
        opened = inputs.open_input(str(tmp_path), crop=crop)
        assert opened.settings["alpha"] == alpha
        assert next(opened.batches([1], 1))[0, :, 0, 0].tolist() == pixel


def test_what_is_white_in_floats_can_be_said(tmp_path):
    for i in range(2):
        Image.fromarray(np.full((4, 4), 100, np.float32)).save(tmp_path / f"{i}.tif")
    opened = inputs.open_input(str(tmp_path), layers=[{"data": {"float_range": 255}}])
    assert next(opened.batches([0], 1)).unique().tolist() == [100]
    with pytest.raises(MsmdiffError, match=r"2 of 2 images .* data.float_range"):
        inputs.open_input(str(tmp_path))
