"""`compare` as a user runs it: a tiny real comparison, killed and gone on with."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from msmdiff.cli.compare import compare
from msmdiff.core.compare import Comparison
from msmdiff.core.compare import spec as specs
from msmdiff.core.errors import MsmdiffError

SPEC = """
arms:
  dense: {}
  masked: {mask: {ratio: 0.75, tail: 0.5}, objective: {name: msm}}
common:
  data: {source: "digits:train", image_size: 8}
  model: {name: null, family: uvit, hidden_size: 16, depth: 3, num_heads: 2, patch_size: 2}
  train: {batch_size: 16, precision: fp32}
  sample: {steps: 2}
  eval: {heldout_n: 16}
budget: {images: 480}
seeds: [0]
slice: 0.01
measure: {points: 2, n: 16, by: heldout, nearest: true}
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def read(path):
    return json.loads(path.read_text())


def weights(folder):
    found = sorted(folder.glob("*/seed-*/stage-1/weights.safetensors"))
    return {str(path.relative_to(folder)): load_file(path) for path in found}


def test_a_killed_comparison_ends_as_one_that_was_not(cli, spec, tmp_path, quiet):
    straight = Comparison(specs.read(spec), tmp_path / "straight", quiet)
    straight.run()
    started = subprocess.Popen(
        [sys.executable, "-m", "msmdiff", "compare", "spec.yaml", "--out", "killed"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, deadline = tmp_path / "killed" / "turns.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") > 5):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (tmp_path / "killed" / "compare.json").exists()
    shown = cli("compare", "spec.yaml", "--out", "killed")
    assert "held-out loss (decides), lower is better" in shown.stdout
    assert "masked, seed 0, 100%" in shown.stdout
    ours, theirs = (weights(tmp_path / name) for name in ("straight", "killed"))
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2
    for name, tensors in ours.items():
        assert all(torch.equal(tensors[key], theirs[name][key]) for key in tensors), name
    one, two = (read(tmp_path / name / "compare.json") for name in ("straight", "killed"))
    for arm in ("dense", "masked"):
        assert one["arms"][arm]["measured"] == two["arms"][arm]["measured"]
        assert set(one["arms"][arm]["measured"]) == {"distance", "heldout", "copied"}


def test_more_seeds_go_on_and_results_are_summed_up(cli, spec, tmp_path, quiet):
    spec.write_text(SPEC.replace("images: 480", "images: 64").replace("[0]", "[0, 1]"))
    for count in (1, 2):
        known = len(quiet.notes)
        asked = specs.read(spec)
        asked.seeds = asked.seeds[:count]
        Comparison(asked, tmp_path / "c", quiet).run()
        assert read(tmp_path / "c" / "compare.json")["seeds"] == list(range(count))
    assert not any("seed 0," in note for note in quiet.notes[known:])  # it was there already
    shutil.copy(tmp_path / "c" / "compare.json", tmp_path / "other.json")
    shown = cli("compare", "c/compare.json", "other.json", "--out", "sum")
    assert shown.stdout.split() == ["sum/summary.md", "sum/crossover.png"]
    text = (tmp_path / "sum" / "summary.md").read_text()
    assert "### c\n\n16 tokens" in text
    assert "### other\n\n16 tokens" in text


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["none.yaml"], "none.yaml cannot be read"),
        (["spec.yaml", "c.json"], "give specs .YAML. or results .compare.json., not both"),
        (["spec.yaml", "sub/spec.yaml"], "would both be called spec: rename one"),
    ],
)
def test_a_wrong_call_is_one_sentence(spec, names, sentence):
    with pytest.raises(MsmdiffError, match=sentence):
        compare([spec.parent / name for name in names], out=spec.parent / "out")
