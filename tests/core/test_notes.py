"""What has no effect is said, and a library user's wrong call is one sentence."""

import pytest

import msmdiff
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.errors import UsageError
from msmdiff.core.model import checked_seeds

DIT = dict(name=None, family="dit", patch_size=2, hidden_size=16, depth=8, num_heads=2)


def notes(**layers):
    config = road.resolve(configuration.build({"model": DIT, **layers}))
    return road.notes(config)


def test_options_of_a_route_that_is_not_taken_are_told():
    assert notes(mask={"ratio": 0.5}) == []
    assert notes(mask={"ratio": 0.5, "enter": 1}) == [
        "mask.enter 1 has no effect on the route visible"
    ]
    (told,) = notes(mask={"route": "tread"}, objective={"name": "msm"})
    assert told == "mask.route tread has no effect while mask.ratio is 0"
    uvit = {**DIT, "family": "uvit", "depth": 9}
    (told,) = notes(model=uvit, mask={"ratio": 0.5, "route": "tread", "leave": 1})
    assert told.startswith("mask.leave 1 has no effect: the long skips")


def test_a_prediction_that_does_not_suit_its_schedule_is_told():
    (told,) = notes(process={"schedule": "edm", "prediction": "velocity"})
    assert told.startswith("process.prediction velocity asks for numbers of about")
    assert notes(process={"schedule": "edm", "prediction": "edm"}) == []
    assert notes(process={"schedule": "flow", "prediction": "velocity"}) == []


def test_noise_that_falls_is_refused():
    with pytest.raises(UsageError, match=r"sigma_min"):
        notes(process={"schedule": "edm", "prediction": "edm", "sigma_min": 100.0})


@pytest.mark.parametrize("seeds", [2, range(0), [1.5], [-1], [True]])
def test_seeds_that_are_none_are_refused(seeds):
    with pytest.raises(UsageError, match=r"seeds"):
        checked_seeds(seeds)


def test_a_base_is_one_name_and_its_neighbours_are_offered(tmp_path):
    (tmp_path / "mine.yaml").write_text("train: {steps: 3}\n")
    path = tmp_path / "other.yaml"
    for base, words in (
        ("[digits-dit]", "base must be one preset's name or one file"),
        ("mien.yaml", "did you mean 'mine.yaml'"),
        ("digits-dti", "did you mean 'digits-"),
    ):
        path.write_text(f"base: {base}\n")
        with pytest.raises(UsageError, match=words):
            presets.read(str(path))
    path.write_text("base: mine.yaml\noptim: {lr: 0.1}\n")
    assert presets.read(str(path)) == {"train": {"steps": 3}, "optim": {"lr": 0.1}}


def test_load_takes_plugins(tmp_path):
    with pytest.raises(UsageError, match=r"plugins nowhere.py: there is no such file"):
        msmdiff.load(tmp_path, plugins=["nowhere.py"])
