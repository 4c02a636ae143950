"""`fid` as a user runs it: inputs, statistics, several processes, runs and their checkpoints."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

TINY = [
    "--batch-size",
    "8",
    "--set",
    "model.hidden_size=16",
    "--set",
    "model.num_heads=2",
    "--set",
    "model.depth=3",
]
TINY += ["--set", "train.preview_every=0", "--set", "sample.steps=3"]
PIXEL = ["--features", "pixel"]


def test_inputs_agree(cli, tmp_path, photos):
    """A folder, its zip, its .npz and its statistics are the same set."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for path in photos.rglob("*.png"):
            archive.write(path, path.relative_to(photos))
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(photos.rglob("*.png"))])
    np.savez(tmp_path / "photos.npz", pixels)
    cli("fid", "stats", "photos", *PIXEL, "-o", "stats.npz")
    stored = np.load(tmp_path / "stats.npz")
    assert {name: str(stored[name]) for name in ("features", "resize", "count", "image_size")} == {
        "features": "pixel-8x8", "resize": "area", "count": "12", "image_size": "40x24"
    }  # fmt: skip
    for other in ("photos", "photos.zip", "photos.npz", "stats.npz"):
        score = json.loads(cli("fid", "photos", other, *PIXEL, "--json", "-").stdout)
        assert score["value"] < 1e-10, other
        assert score["count_b"] == 12
    assert "image_size 40x24 against 8x8" in cli("fid", "photos", "digits", *PIXEL).stdout
    done = cli("fid", "photos", "stats.npz", "--weights", "x.pth", code=2)
    assert (
        "stats.npz holds statistics of pixel-8x8: it needs --features pixel, not inception"
        in done.stderr
    )
    done = cli("fid", "photos", "photos.npz", "--weights", "x.pth", code=2)
    assert "--weights x.pth does not exist" in done.stderr


def test_every_inception_metric_with_settings_and_a_picture(
    cli, tmp_path, photos, random_inception
):
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "samples.npz", rng.integers(0, 255, (9, 24, 40, 3), np.uint8))
    weights = ["--weights", str(random_inception)]
    metrics = ["--metrics", "fid,sfid,is,kid,prdc", "--set", "metric.is_splits=3"]
    done = cli(
        "fid", "samples.npz", "photos", *weights, *metrics, "--json", "s.json", "--plot", "p.png"
    )
    report = json.loads((tmp_path / "s.json").read_text())
    assert list(report["scores"]) == [
        "fid",
        "sfid",
        "is",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
    ]
    assert report["value"] == report["scores"]["fid"]["value"] > 0
    assert report["measured"][0]["resize"] == "pytorch-fid"
    assert report["settings"]["kid_subsets"] == 100
    assert report["sets"]["photos"]["image_size"] == "40x24"
    assert "not the published ones" in done.stdout
    assert (
        "note: 9 images: below 10,000 a Fréchet distance is biased upwards, strongly below the 2048"
        in done.stdout
    )
    assert Image.open(tmp_path / "p.png").width > 300


def test_options_of_metrics_and_features_and_what_scripts_read(cli, photos):
    command = ["fid", "photos", "digits", *PIXEL, "--metrics", "kid,fid", "--json", "-"]
    done = cli(*command, "--precision", "fp32", "--set", "metric.kid_subsets=3")
    report = json.loads(done.stdout)
    assert report["metric"] == "pixel Fréchet distance"
    assert list(report["scores"]) == ["fd_pixel", "kid"]
    expected = dict(splits=10, kid_subsets=3, kid_size=1000, k=3, k_density=5)
    expected |= dict(resize=None, precision="fp32", metrics=["kid", "fid"])
    assert {name: report["settings"][name] for name in expected} == expected
    for options, message in (
        (["--set", "metric.is_splits=3"], "metric.is_splits has no effect on --metrics kid,"),
        (["--set", "features.precision=bf16"], "features.precision = bf16 has no effect on"),
        (["--set", "metric.kid_size.a=3"], "metric.kid_size = {'a': 3}"),
        (["--set", "metric.kid_size=3", "--set", "sample.steps=3"], "error: --set sample.steps=3"),
    ):
        done = cli(*command, *options, code=2)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_two_processes_give_the_same_numbers(cli, tmp_path, photos):
    rng = np.random.default_rng(1)
    np.savez(tmp_path / "samples.npz", rng.integers(0, 255, (301, 24, 40, 3), np.uint8))
    command = ["fid", "samples.npz", "photos", *PIXEL, "--metrics", "fid,kid,prdc", "--json", "-"]
    alone = json.loads(cli(*command).stdout)
    together = cli(*command, processes=2)
    both = json.loads(together.stdout)
    assert both["device"] == "cpu, 2 processes"
    for name, score in alone["scores"].items():
        assert both["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-9), name
        assert both["scores"][name]["count_a"] == 301


def test_distances_along_a_run(cli, tmp_path):
    """While training, by a second run of the same seeds, and of every checkpoint afterwards."""
    run = tmp_path / "runs" / "r"
    train = [
        "train",
        "--run",
        "r",
        *TINY,
        "--set",
        "eval.every=2",
        "--set",
        "eval.n=24",
        "--set",
        "eval.features=pixel",
    ]
    train += [
        "--set",
        "train.checkpoint_every=2",
        "--set",
        "train.keep_checkpoints=3",
        "--set",
        "ema.decays=[]",
    ]
    done = cli(*train, "--steps", "4")
    assert "measuring 1,797 reference images" in done.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {line["images"]: line["fd_pixel"] for line in lines if "fd_pixel" in line}
    assert list(measured) == [16, 32]
    best = json.loads((run / "best.json").read_text())
    assert best["value"] == min(measured.values())
    assert measured[best["images"]] == best["value"]
    assert (run / best["checkpoint"] / "model.safetensors").is_file()
    assert Image.open(run / "previews" / "best.png").width > 300

    # What is measured may change, and the reference is kept.
    done = cli(*train, "--steps", "6", "--set", "eval.n=23")
    assert "reference images" not in done.stdout
    assert "of 23 samples" in done.stdout
    assert "(2 earlier, with other settings of eval or sample, do not count)" in done.stdout
    assert json.loads((run / "best.json").read_text())["images"] == 48  # like is compared with like

    command = ["fid", "--run", "r", "--every-checkpoint", *PIXEL, "--n", "24", "--json", "-"]
    report = json.loads(cli(*command).stdout)
    found = {row["a"].split("/")[-2]: row["value"] for row in report["checkpoints"]}
    assert list(found) == ["img-000000016", "img-000000032", "img-000000048"]
    for images, value in measured.items():
        assert found[f"img-{images:09d}"] == pytest.approx(value, rel=1e-6)
    assert json.loads((run / "every-checkpoint-fd_pixel.json").read_text())["value"] == min(
        found.values()
    )

    command = [
        "fid",
        "r",
        "digits",
        "--crop",
        "16",
        *PIXEL,
        "--n",
        "24",
        "--set",
        "sample.eta=0",
        "--json",
        "-",
    ]
    one = json.loads(cli(*command).stdout)
    assert one["value"] == pytest.approx(found["img-000000048"], rel=1e-6)
    assert (one["sets"]["r"]["n"], one["sets"]["r"]["sample"]["steps"]) == (24, 3)

    # A name that the embedded data has, which the reference must remain.
    run.rename(tmp_path / "runs" / "digits")
    named = json.loads(cli("fid", "--run", "digits", *PIXEL, "--n", "24", "--json", "-").stdout)
    assert (named["count_a"], named["count_b"]) == (24, 1797)
    assert named["value"] == pytest.approx(found["img-000000048"], rel=1e-6)
    (tmp_path / "runs" / "digits").rename(tmp_path / "runs" / "gone")
    config = tmp_path / "runs" / "gone" / "config.yaml"
    config.write_text(config.read_text().replace("source: digits", "source: gone"))
    done = cli("fid", "--run", "gone", *PIXEL, code=2)
    assert (
        "--run gone: the data it was trained on, gone, is not there: name the other side"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["photos", "photos/cat"], 2, "lies in the other"),
        (
            ["photos", "photos", "--metrics", "fid,nope"],
            2,
            "--metrics 'nope' is none of the metrics; there are fid",
        ),
        (["photos", "photos", "--metrics", "is"], 2, "features inception: pixel has no classes"),
        (["photos", "photos", "--resize", "clean"], 2, "no effect on --features pixel"),
        (
            ["photos", "photos", "--bootstrap", "1"],
            2,
            "--bootstrap 1: one drawing has no spread; give at least 2",
        ),
        (
            ["photos", "digits", "--weights", "x.pth"],
            2,
            "--weights x.pth: pixel features have no weights",
        ),
        (
            ["photos", "digits", "--n", "30"],
            2,
            "--n 30: nothing is drawn, for no side is a run or weights",
        ),
        (
            ["photos", "digits", "--set", "sample.steps=3"],
            2,
            "--set sample.steps=3: nothing is drawn",
        ),
        (["--run", "none"], 2, "--run none: no run with a config.yaml"),
        (["photos", "photos", "--every-checkpoint"], 2, "--every-checkpoint goes with --run RUN"),
        (["empty", "photos"], 2, "empty holds no images"),
        (["stats", "photos"], 2, "needs a file to write: -o reference.npz"),
        (
            ["stats", "photos", "-o", "images.npz"],
            2,
            "images.npz is there already, and was not written by msmdiff",
        ),
        (["weights.safetensors", "photos"], 2, "neither a weights file nor a run"),
    ],
)
def test_mistakes_get_one_sentence(cli, tmp_path, photos, arguments, code, message):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    done = cli("fid", *arguments, *PIXEL, code=code)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_outputs_never_replace_what_is_not_ours(cli, tmp_path, photos):
    """Nor is anything measured before an output is refused: of these sets there are none."""
    (tmp_path / "mine.json").write_text('{"settings": "mine"}')
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    Image.new("RGB", (2, 2)).save(tmp_path / "mine.png")
    before = {name: (tmp_path / name).read_bytes() for name in ("theirs.npz", "mine.png")}
    outputs = {"--json": "mine.json", "-o": "theirs.npz", "--plot": "mine.png"}
    for option, name in outputs.items():
        done = cli("fid", "none", "neither", option, name, *PIXEL, code=2)
        assert f"{name} is there already, and was not written by msmdiff" in done.stderr
    for name, words in (
        ("mine.json/s.json", "mine.json is not a folder"),
        ("photos", "photos is a folder: name a file"),
    ):
        done = cli("fid", "none", "neither", "--json", name, *PIXEL, code=1)
        assert words in done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    given = [text for pair in outputs.items() for text in pair]
    cli("fid", "photos", "photos", *given, *PIXEL, "--overwrite")
    cli("fid", "photos", "photos", *given, *PIXEL)  # ours now
    assert json.loads((tmp_path / "mine.json").read_text())["count_b"] == 12
