"""Figures and pictures of runs, and what trackers are shown."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from msmdiff.cli import app
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.errors import UsageError
from msmdiff.core.training import results, trackers
from msmdiff.core.training.run import Run
from msmdiff.core.training.trainer import train

LINES = [
    {"images": 8 * i, "step": i, "loss": 1 / i, "images_per_s": 10.0, "val_loss": 2 / i}
    for i in range(1, 4)
]
LINES.append({"images": 24, "step": 3, "fd_pixel": 7.5, "eval_n": 40, "saved": True,
              "measured_as": "x"})  # fmt: skip


def test_what_a_loss_is_an_error_of():
    def of(**layers):
        return results.meaning(configuration.build(layers))

    assert of(objective={"name": "dsm"}) == "error of eps in pixels, over all tokens"
    masked = of(objective={"name": "msm"}, mask={"ratio": 0.9}, process={"prediction": "x0"})
    assert masked == "error of x0 in pixels, over the visible tokens"
    tread = of(objective={"name": "msm"}, mask={"ratio": 0.5, "route": "tread"})
    assert tread == "error of eps in pixels, over all tokens"
    jit = of(process={"schedule": "flow", "prediction": "x0", "weighting": "velocity"})
    assert jit == "error of x0 in pixels, weighted by velocity, over all tokens"
    assert of(codec={"name": "dwt"}, objective={"name": "dsm"}).startswith(
        "error of eps in wavelets"
    )


WORDS = [
    ("digits-meanflow", {}, "adaptive error S / (S + 0.01)^1 of average_velocity in pixels, "
     "over all tokens"),
    ("digits-meanflow", {"objective": {"tangent": "head", "adaptive_power": 0.5}},
     "adaptive error S / (S + 0.01)^0.5 and of its velocity head of average_velocity in pixels, "
     "over all tokens"),
    ("digits-meanflow", {"mask": {"ratio": 0.5}}, "adaptive error S / (S + 0.01)^1 of "
     "average_velocity in pixels, over the visible tokens"),
    ("digits-tread", {}, "error of velocity in pixels, over all tokens"),
    ("digits-layersync", {"objective": {"align_weight": 0.25, "align_until": 0.5}},
     "error of velocity in pixels, over all tokens, plus 0.25 x alignment (layersync) until 50% "
     "of the training"),
    ("digits-mdt", {}, "over all tokens, with and without the mask"),
    ("digits-edt", {}, "over all tokens, with and without the mask"),
    ("digits-maskdit", {}, "over the visible tokens, plus 0.1 x reconstruction of the others"),
    ("digits-maskdit", {"objective": {"reconstruction": 0}}, "over the visible tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "layer", "words"), WORDS)
def test_a_loss_with_more_in_it_says_so(preset, layer, words):
    config = road.resolve(configuration.build(configuration.preset(preset), layer), 10)
    assert results.meaning(config).endswith(words)
    if words.startswith(("error", "adaptive")):
        assert results.meaning(config) == words


def test_a_picture_has_a_panel_for_each_thing_there_is(tmp_path):
    config = configuration.build({})
    results.draw(tmp_path, LINES, config)
    whole = Image.open(tmp_path / "results.png").size
    results.draw(tmp_path, [{"images": 8, "loss": 1.0}], config)
    one = Image.open(tmp_path / "results.png").size
    assert whole == (4 * one[0], one[1]) == (4 * 440, 340)


def test_how_a_run_stands(tmp_path, quiet):
    layers = {
        "model": {"hidden_size": 16, "num_heads": 2, "depth": 3},
        "train": {"steps": 3, "batch_size": 8, "log_every": 1, "preview_every": 0},
        "sample": {"steps": 2},
        "eval": {"every": 3, "n": 8, "features": "pixel"},
    }
    train(configuration.build(layers), tmp_path / "r", quiet)
    found = results.standing(tmp_path / "r")
    lines = Run(tmp_path / "r", writes=False).metrics()
    assert found is not None
    assert (found.name, found.steps, found.of, found.metric) == ("r", 3, 3, "fd_pixel")
    assert found.distance == next(line["fd_pixel"] for line in lines if "fd_pixel" in line)
    assert found.loss == [line["loss"] for line in lines if "loss" in line][-1]
    assert found.bytes > (tmp_path / "r" / "weights.safetensors").stat().st_size
    assert (tmp_path / "r" / "results.png").is_file()
    assert results.standing(tmp_path) is None
    results.compare([tmp_path / "r", tmp_path / "r"], tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").width == 1430


def test_trackers_get_pictures(tmp_path):
    class Tracker:
        def __init__(self, name):
            self.name, self.shown = name, []

        def log_images(self, values, step, **how):
            self.shown.append((values, step, how))

    class Accelerator:
        trackers = [Tracker("tensorboard"), Tracker("wandb")]  # noqa: RUF012

    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "img-8-samples.png")
    trackers.pictures(Accelerator(), tmp_path / "img-8", 8)
    board, wandb = Accelerator.trackers
    (values, step, how), = board.shown  # fmt: skip
    assert (values["samples"].shape, step, how) == ((1, 4, 6, 3), 8, {"dataformats": "NHWC"})
    assert np.array_equal(wandb.shown[0][0]["samples"][0], values["samples"][0])
    assert json.dumps(wandb.shown[0][2]) == "{}"


@pytest.mark.parametrize("command", [["runs", "r", "--plot"], ["report", "r", "-o"]])
def test_a_picture_or_page_replaces_its_own_kind_only(tmp_path, monkeypatch, quiet, command):
    monkeypatch.chdir(tmp_path)
    run = Run(tmp_path / "r")
    run.start(configuration.build({}), "", 0)
    run.close()
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    refused = CliRunner().invoke(app, [*command, "kept.txt"])
    assert isinstance(refused.exception, UsageError)
    assert "kept.txt is there already, and was not written by msmdiff" in str(refused.exception)
    assert kept.read_text() == "mine"
    for options in (["new"], ["new"], ["kept.txt", "--overwrite"]):  # the second finds its own
        done = CliRunner().invoke(app, [*command, *options])
        assert done.exit_code == 0, done.exception
    assert kept.read_bytes() != b"mine"
    Image.new("RGB", (2, 2)).save(tmp_path / "foreign.png")
    refused = CliRunner().invoke(app, [*command, "foreign.png"])
    assert isinstance(refused.exception, UsageError)


def test_a_checkpoint_that_goes_away_meanwhile_is_passed_over(tmp_path, monkeypatch, quiet):
    run = Run(tmp_path / "r")
    run.start(configuration.build({}), "", 0)
    run.close()
    folder = tmp_path / "r" / "checkpoints" / "img-000000008"
    folder.mkdir(parents=True)
    there = results.standing(tmp_path / "r")
    (folder / "state.pt").write_bytes(bytes(1000))
    (folder / "model.safetensors").write_bytes(bytes(10))
    looked = Path.stat

    def replaced(self, **how):
        if self.name == "state.pt":
            self.unlink(missing_ok=True)
        return looked(self, **how)

    monkeypatch.setattr(Path, "stat", replaced)
    found = results.standing(tmp_path / "r")
    assert found.bytes == there.bytes + 10
