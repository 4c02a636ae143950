"""One page about runs: whole, light, and without a request."""

import json
import re

import chromium
import pytest
from PIL import Image

from msmdiff.core import config as configuration
from msmdiff.core import presets, report
from msmdiff.core.errors import UsageError
from msmdiff.core.report import expected
from msmdiff.core.report.charts import chart, short
from msmdiff.core.training import results
from msmdiff.core.training.trainer import train

LAYERS = {
    "data": {"source": "digits:train"},
    "model": {"hidden_size": 16, "num_heads": 2, "depth": 3},
    "train": {"steps": 4, "batch_size": 8, "log_every": 1, "preview_every": 2,
              "checkpoint_every": 2},
    "mask": {"ratio": 0.75},
    "objective": {"name": "msm"},
    "sample": {"steps": 2},
    "eval": {"heldout_n": 8},
}  # fmt: skip


def test_a_page_holds_what_is_known_of_runs_and_loads_nothing(tmp_path, quiet):
    train(configuration.build(LAYERS), tmp_path / "one", quiet)
    other = {"optim": {"lr": 5e-4}, "train": {"steps": 2}}
    train(configuration.build(LAYERS, other), tmp_path / "two", quiet)
    size = report.write([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert size == len(page.encode()) < 3_000_000
    for address in re.findall(r'(?:src|href)="([^"]*)', page):
        assert address.startswith("data:")
    assert "url(" not in page
    assert "<title>one, two</title>" in page
    # Slides: samples after 16 and 32 images, what the mask leaves at 0, too.
    slides = re.findall(r'type="range" min="0" max="(\d)" value="\1"', page)
    assert slides == ["1", "2", "0", "1"]
    assert page.count("<img") == 2 + 3 + 1 + 2
    assert page.count(" hidden>") == 1 + 2 + 0 + 1
    differs = page[page.index("What differs") : page.index("Configuration that is the same")]
    assert re.findall(r"<td>([a-z]+\.\w+)</td>", differs) == ["optim.lr", "train.steps"]
    assert "<td>0.0005</td>" in differs
    assert "held-out loss by noise level" in page
    assert "<span>msmdiff</span> <span>finetune</span> <span>--ckpt</span>" in page


def test_stored_curves_stand_behind_runs_with_the_same_settings(tmp_path, quiet, monkeypatch):
    measured = {"eval": {"heldout_n": 8, "every": 2, "n": 4, "features": "pixel"}}
    train(configuration.build(LAYERS, measured), tmp_path / "one", quiet)
    (tmp_path / "presets" / "expected").mkdir(parents=True)
    stored = tmp_path / "presets" / "expected" / "tiny.json"
    report.store(tmp_path / "one", stored)
    curves = expected.read(stored).curves
    log = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").open()]
    assert curves["loss"] == [(line["images"], line["loss"]) for line in log if "loss" in line]
    distance = results.distance_key(log)
    assert {len(curves[key]) for key in ("val_loss", distance)} == {2}

    monkeypatch.setattr(presets, "folder", lambda: tmp_path / "presets")
    # The whole of the data, another length and other pictures: the same curve is to be expected.
    alike = {"data": {"source": "digits"}, "train": {"steps": 2, "seed": 1}, "sample": {"steps": 3}}
    for name, changes, dashed in (
        ("alike", alike, 1),
        ("faster", {"optim": {"lr": 5e-4}}, 0),
        ("wider", {"model": {"hidden_size": 24}}, 0),
    ):
        train(configuration.build(LAYERS, {"train": {"steps": 2}}, changes), tmp_path / name, quiet)
        report.write([tmp_path / name], tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert page.count("stroke-dasharray") == dashed
        assert page.count("</i>expected: one</span>") == dashed
        assert ("Dashed: one, msmdiff" in page) == bool(dashed)
    # A distance compares where it was measured in the same way only.
    for name, changes, dashed in (("same", {}, 3), ("fewer", {"eval": {"n": 3}}, 2)):
        train(configuration.build(LAYERS, measured, changes), tmp_path / name, quiet)
        report.write([tmp_path / name], tmp_path / "page.html")
        assert (tmp_path / "page.html").read_text().count("stroke-dasharray") == dashed
    # Asked for, they stand behind any run.
    report.write([tmp_path / "wider"], tmp_path / "page.html", [expected.read(stored)])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("stroke-dasharray") == 2

    nameless = {**json.loads(stored.read_text()), "name": None}
    for other in ("{}", "[1]", json.dumps(nameless)):
        (tmp_path / "other.json").write_text(other)
        with pytest.raises(UsageError, match=r"other\.json holds no curves: give a file that"):
            expected.read(tmp_path / "other.json")
    assert expected.ours(stored)
    assert not expected.ours(tmp_path / "other.json")


def test_pictures_are_thinned_evenly_until_they_fit(tmp_path):
    paths = []
    for i in range(9):
        path = tmp_path / f"img-{i:09d}-samples.png"
        Image.effect_noise((64, 64), 80).save(path)
        paths.append(path)
    whole = report._chosen(paths, 10**9)
    assert [seen for seen, _ in whole] == list(range(9))
    fewer = report._chosen(paths, sum(len(source) for _, source in whole) * 6 // 9)
    assert [seen for seen, _ in fewer] == [0, 2, 4, 6, 8]


def test_curves_are_placed_and_thinned():
    drawn = chart("loss", {"a<b": [(0, 1.0), (1000, 10.0)], "none": []}, log=True)
    assert 'points="58.0,226.0 450.0,12.0"' in drawn  # the frame's corners
    assert "a&lt;b" not in drawn  # one curve needs no legend
    assert chart("empty", {"a": []}) == ""
    many = chart("many", {"a": [(i, i) for i in range(5000)], "b": [(1, 1)]})
    points = re.search(r'points="([^"]*)', many)
    assert points is not None
    assert 380 < len(points.group(1).split()) <= 401
    assert "<circle" in many
    assert [short(n) for n in (7, 12_800, 3e6)] == ["7", "12.8k", "3M"]


def test_what_is_no_run_is_refused_and_a_lost_record_is_not_missed(tmp_path, quiet):
    with pytest.raises(UsageError, match="is no run"):
        report.write([tmp_path / "none"], tmp_path / "page.html")
    train(configuration.build(LAYERS, {"train": {"steps": 1}}), tmp_path / "r", quiet)
    (tmp_path / "r" / "run.json").write_text("torn")
    assert report.write([tmp_path / "r"], tmp_path / "page.html") > 1000
    assert json.dumps(report.read(tmp_path / "r").circumstances) == "{}"


@pytest.mark.skipif(chromium.found() is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_the_page_whole_at_any_width_and_asks_for_nothing(tmp_path, quiet):
    train(configuration.build(LAYERS), tmp_path / "one", quiet)
    report.write([tmp_path / "one"], tmp_path / "page.html")
    shown = (
        "[...document.querySelectorAll('.over-time')].map(figure => [...figure.querySelectorAll("
    )
    shown += "'img')].filter(picture => picture.checkVisibility()).map(p => p.dataset.seen))"
    with chromium.browser(str(chromium.found()), tmp_path / "profile") as page:
        for width, dark in ((1200, False), (380, True)):
            page.open(tmp_path / "page.html", width, dark)
            # Nothing sticks out to the right, and paper and ink are far apart.
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            colours = page.evaluate(
                "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
            )
            paper, ink = (sum(map(int, re.findall(r"\d+", each))) / 3 for each in colours)
            assert (paper < 60 and ink > 200) if dark else (paper > 200 and ink < 60)
            curves = "Math.min(...[...document.querySelectorAll('svg')].map(drawn => "
            assert page.evaluate(curves + "drawn.getBoundingClientRect().height))") > 100
            loaded = "[...document.images].every(picture => picture.naturalWidth > 0)"
            assert page.evaluate(loaded)
        assert page.evaluate(shown) == [["32"], ["32"]]
        page.evaluate("document.querySelector('input').focus()")
        page.press("ArrowLeft", 37)
        assert page.evaluate(shown) == [["16"], ["32"]]
        assert page.evaluate("document.querySelector('output').textContent") == "16"
        assert page.complaints == []
        assert {address.split(":")[0] for address in page.requests} == {"file", "data"}
