"""`msmdiff sample` as a user runs it, on tiny random networks."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import weights
from msmdiff.core.metrics import evaluate, inputs, statistics
from msmdiff.core.metrics.features import PixelFeatures
from msmdiff.core.seeding import numpy_stream

FAST = ["--steps", "3", "--batch-size", "4"]


def save(path, seed, **layers):
    torch.manual_seed(seed)
    model = {"num_classes": 10, "hidden_size": 16, "num_heads": 2, "depth": 3}
    config = road.resolve(configuration.build({"model": model}, layers))
    network = road.build(config).backbone
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    weights.save(path, network.state_dict(), config)


@pytest.fixture
def model(tmp_path):
    save(tmp_path / "r.safetensors", 0)
    return "r.safetensors"


def pixels(folder):
    return {p.name: np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("*.png"))}


def test_a_killed_sampling_is_completed_and_whole_images_stay(cli, tmp_path, model):
    cli(
        "sample",
        model,
        "--n",
        "9",
        *FAST,
        "--out",
        "a",
        "--npz",
        "a.npz",
        "--stats",
        "a-stats.npz",
        "--features",
        "pixel",
    )
    before = pixels(tmp_path / "a")
    kept = tmp_path / "a" / "000004.png"
    stamp = kept.stat().st_mtime_ns
    torn = tmp_path / "a" / "000006.png"
    torn.write_bytes(torn.read_bytes()[:-20])
    (tmp_path / "a" / "000002.png").unlink()
    (tmp_path / "a" / ".000002.png.part").write_bytes(b"half")
    done = cli(
        "sample",
        model,
        "--n",
        "9",
        *FAST,
        "--out",
        "a",
        "--npz",
        "b.npz",
        "--stats",
        "b-stats.npz",
        "--features",
        "pixel",
    )
    assert "(7 were there)" in done.stdout
    after = pixels(tmp_path / "a")
    assert after.keys() == before.keys()
    assert all(np.abs(after[name] - before[name]).max() <= 1 for name in before)
    assert kept.stat().st_mtime_ns == stamp
    assert not list((tmp_path / "a").glob(".*"))
    first, second = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert np.abs(first["arr_0"].astype(int) - second["arr_0"]).max() <= 1
    assert second["arr_1"].tolist() == [seed % 10 for seed in range(9)]
    assert json.loads((tmp_path / "a" / "sample.json").read_text())["seeds"] == "0-8"


def test_straight_into_statistics(cli, tmp_path, model):
    cli("sample", model, "--n", "12", *FAST, "--out", "a")
    cli(
        "sample",
        model,
        "--n",
        "12",
        *FAST,
        "--no-png",
        "--stats",
        "s.npz",
        "--features",
        "pixel",
        "--out",
        "none",
    )
    assert not (tmp_path / "none").exists()
    got = statistics.load(tmp_path / "s.npz")
    expected = evaluate.of_input(inputs.open_input(str(tmp_path / "a")), PixelFeatures())
    assert got.count == 12
    np.testing.assert_allclose(got.pooled.mean, expected.pooled.mean, atol=1e-3)
    np.testing.assert_allclose(got.pooled.cov, expected.pooled.cov, atol=1e-3)
    assert json.loads(str(np.load(tmp_path / "s.npz")["sampled"]))["seeds"] == "0-11"
    cli("sample", model, "--n", "5", *FAST, "--no-png", "--npz", "n.npz", "--out", "none")
    assert (tmp_path / "n.grid.png").is_file()  # beside the file whose images it shows
    assert not (tmp_path / "none.grid.png").exists()


def test_several_processes_make_the_same_set(cli, tmp_path, model):
    options = ["--n", "7", *FAST, "--classes", "random", "--features", "pixel"]
    cli("sample", model, *options, "--out", "one", "--npz", "one.npz", "--stats", "one-stats.npz")
    two_processes = ["--out", "two", "--npz", "two.npz", "--stats", "two-stats.npz"]
    cli("sample", model, *options, *two_processes, processes=2)
    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(np.abs(one[name] - two[name]).max() <= 1 for name in one)
    first, second = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert first["arr_1"].tolist() == second["arr_1"].tolist()
    assert first["arr_1"].tolist() == [
        int(numpy_stream(seed, "class").integers(10)) for seed in range(7)
    ]
    assert np.abs(first["arr_0"].astype(int) - second["arr_0"]).max() <= 1
    a, b = (statistics.load(tmp_path / f"{name}-stats.npz") for name in ("one", "two"))
    assert a.count == b.count == 7
    np.testing.assert_allclose(a.pooled.cov, b.pooled.cov, atol=1e-3)


def test_several_sources_presets_and_a_guide(cli, tmp_path, model):
    save(tmp_path / "weak.safetensors", 1)
    cli(
        "sample", model, "weak.safetensors", "--n", "2", *FAST, "--preset", "maskdm", "--cfg", "1.5"
    )
    for name in ("r", "weak"):
        settings = json.loads((tmp_path / "samples" / name / "sample.json").read_text())["sample"]
        assert (settings["eps_after_clip"], settings["eta"], settings["steps"]) == ("raw", 1.0, 3)
        assert (settings["cfg_scale"], settings["rounding"]) == (1.5, "half_up")
    cli(
        "sample",
        model,
        "--n",
        "2",
        *FAST,
        "--guide",
        "weak.safetensors",
        "--cfg",
        "2",
        "--out",
        "g",
    )
    assert len(json.loads((tmp_path / "g" / "sample.json").read_text())["guide_sha256"]) == 64
    save(tmp_path / "other.safetensors", 1, process={"prediction": "v"})
    done = cli(
        "sample",
        model,
        "--n",
        "1",
        "--guide",
        "other.safetensors",
        "--cfg",
        "2",
        "--out",
        "h",
        code=2,
    )
    assert "has process.prediction v, not eps" in done.stderr
    done = cli("sample", model, "--preset", "maskdn", "--out", "h", code=2)
    assert "did you mean 'maskdm'?" in done.stderr
    done = cli("sample", model, "--steps", "ddim900", "--out", "h", code=2)
    assert "no whole stride takes 900 of 1000" in done.stderr
    done = cli("sample", model, "--set", "sample.amm=default", "--out", "h", code=2)
    assert "uvit has no attention modulation" in done.stderr
    for eta in (["--eta", "0.5"], ["--set", "sample.eta=0.5"]):
        done = cli("sample", model, "--sampler", "ddpm", *eta, "--out", "e", code=2)
        assert "sample.eta 0.5 has no effect on the sampler ddpm, only on ddim" in done.stderr
    done = cli("sample", model, "--set", "sample.order=3", "--out", "e", code=2)
    assert (
        "sample.order 3 has no effect on the sampler ddim, only on dpm_solver, dpm_solver++, unipc"
        in done.stderr
    )
    assert not (tmp_path / "e").exists()


def test_pictures(cli, tmp_path, model):
    image, mask = np.full((16, 16, 3), 200, np.uint8), np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    cli(
        "sample",
        model,
        *FAST,
        "--n",
        "3",
        "--interpolate",
        "4,9",
        "--out",
        "a",
        "--sampler",
        "ddpm",
    )
    cli(
        "sample",
        model,
        *FAST,
        "--n",
        "3",
        "--inpaint",
        "image.png",
        "mask.png",
        "--out",
        "a",
        "--sampler",
        "unipc",
    )
    cli("sample", model, *FAST, "--n", "2", "--trajectory", "--out", "a")
    cli(
        "sample",
        model,
        *FAST,
        "--seeds",
        "4",
        "--classes",
        "4",
        "--out",
        "alone",
        "--sampler",
        "ddpm",
    )
    strip = np.asarray(Image.open(tmp_path / "a.interpolate.png"))
    zoom = 3  # 16-pixel images are shown at 48
    tiles = [
        strip[2 : 2 + 48 : zoom, 2 + i * 50 : 50 + i * 50 : zoom].astype(int) for i in range(3)
    ]
    alone = np.asarray(Image.open(tmp_path / "alone" / "000004.png")).astype(int)
    assert np.abs(tiles[0] - alone).max() <= 1
    assert np.abs(tiles[1] - alone).max() > 1
    filled = np.asarray(Image.open(tmp_path / "a.inpaint.png"))
    for i in range(1, 4):
        tile = filled[2 : 2 + 48 : zoom, 2 + i * 50 : 50 + i * 50 : zoom]
        assert (tile[:, :8] == 200).all()
        assert tile[:, 8:].std() > 1
    shape = np.asarray(Image.open(tmp_path / "a.trajectory.png")).shape
    assert shape == (2 * 50 + 2, 4 * 50 + 2, 3)  # three predictions and the end
    assert not (tmp_path / "a").exists()
    done = cli("sample", model, "--inpaint", "image.png", "nothing.png", code=2)
    assert "nothing.png cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--no-png"], "leaves nothing to write"),
        (["--no-png", "--npz", "."], "--npz . is a folder: name a file"),
        (["--interpolate", "4,9", "--npz", "x.npz"], "--npz has no effect with --interpolate"),
        (["--interpolate", "4,9", "--trajectory"], "--trajectory has no effect with --interpolate"),
        (["--interpolate", "4,9", "--seeds", "0-3"], "--seeds has no effect with --interpolate"),
        (["--interpolate", "4,9", "--n", "1"], "at least 2 images (--n)"),
        (["--features", "pixel"], "--features has no effect without --stats"),
        (["--classes", "3,10"], "--classes 3,10: the classes are 0 to 9"),
        (["--set", "model.hidden_size=32"], "r.safetensors says itself what its network is (16)"),
        (["--set", "codec.level=2"], "codec.level 2 has no effect on the codec pixel, only on dwt"),
        (
            ["--preset", "uvit-continuous"],
            "sample.end 0.0001 is free of noise in this process: end at 0.001 or later",
        ),
        (
            ["--no-png", "--npz", "precious.npz"],
            "precious.npz is there already, and was not written by msmdiff",
        ),
        (
            ["--no-png", "--features", "pixel", "--stats", "precious.npz"],
            "precious.npz is there already",
        ),
        (["--trajectory", "--out", "keep"], "keep.trajectory.png is there already"),
        (["--out", "keep"], "keep.grid.png is there already"),
        (
            ["--inpaint", "image.png", "small.png"],
            "small.png is 16x9, and must be 16x16 like image.png",
        ),
        (["--inpaint", "image.png", "black.png"], "black.png is black"),
    ],
)
def test_what_would_be_lost_or_ignored_is_refused(cli, tmp_path, model, options, words):
    (tmp_path / "precious.npz").write_bytes(b"mine")
    for name, size in (("image", (16, 16)), ("small", (16, 9)), ("black", (16, 16))):
        Image.new("RGB", size, (0, 0, 0) if name == "black" else (255, 255, 255)).save(
            tmp_path / f"{name}.png"
        )
    for kind in ("grid", "trajectory"):
        (tmp_path / f"keep.{kind}.png").write_bytes(b"mine")
    count = [] if {"--n", "--seeds"} & set(options) else ["--n", "2"]
    done = cli("sample", model, *count, *options, code=2)
    assert words in done.stderr
    assert (tmp_path / "precious.npz").read_bytes() == b"mine"
    assert (tmp_path / "keep.grid.png").read_bytes() == b"mine"


def test_a_scale_for_an_unconditional_network_names_the_option(cli, tmp_path):
    save(
        tmp_path / "u.safetensors",
        0,
        model={"num_classes": 0, "hidden_size": 16, "num_heads": 2, "depth": 3},
    )
    done = cli("sample", "u.safetensors", "--cfg", "2", "--n", "1", code=2)
    assert "sample.cfg_scale 2 (--cfg): u.safetensors is unconditional" in done.stderr
