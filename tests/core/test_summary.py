"""Comparisons side by side, from results whose ratios are known."""

import json
from pathlib import Path

import pytest

from msmdiff.core.compare import spec as specs
from msmdiff.core.compare import summary
from msmdiff.core.errors import MsmdiffError, UsageError

PAGE = Path(__file__).parents[2] / "docs" / "does-masking-pay"
BLOCKS = PAGE.with_name("blocks")


def result(tokens, arms, budget=None):
    """A comparison of `dense` and arms of (route, unmasked share, held-out losses)."""
    arms = {"dense": (None, 1.0, [0.2, 0.4]), **arms}
    return {
        "spec": {"budget": budget or {"seconds": 60.0, "flops": None, "images": None}},
        "metrics": {"heldout": "held-out loss"},
        "by": "heldout",
        "seeds": [0, 1],
        "device": "CPU, 1 threads",
        "unsteady": 0.1,
        "arms": {
            name: {
                "measured": {"heldout": summary.summed_up(values)},
                "masking": {
                    "tokens": tokens,
                    "hidden": 0.0 if route is None else 0.75,
                    "route": route,
                    "unmasked": unmasked,
                },
                "images": 1000,
                "flops": 2e12,
                "seconds": 61.2,
            }
            for name, (route, unmasked, values) in arms.items()
        },
    }


def test_a_gain_is_told_seed_by_seed_beside_the_first_arm():
    """0.1 / 0.2 and 0.6 / 0.4: the ratio of the means would be 1.17."""
    (gain,) = summary.gains({"few": result(64, {"msm": ("msm", 0.2, [0.1, 0.6])})})
    assert gain.ratio["values"] == pytest.approx([0.5, 1.5])
    assert gain.ratio["mean"] == pytest.approx(1.0)
    assert (gain.tokens, gain.arm, gain.budget) == (64, "msm", "60 seconds")


def test_the_table_has_every_arm_with_its_cost_and_ratio():
    text = summary.markdown({"few": result(64, {"msm": ("msm", 0.2, [0.1, 0.2])})})
    assert text.startswith("### few\n\n64 tokens, 60 seconds for every arm and seed, 2 seeds")
    assert "| dense | 0% | 100% | 1,000 | 2 | 61.2 | 0.3 (0.2 0.4) | 1 |" in text
    assert (
        "| msm | 75% | 20% | 1,000 | 2 | 61.2 | 0.15 (0.1 0.2) | 0.500 (0.500 to 0.500) |" in text
    )


def test_budgets_are_told_in_their_units():
    flops = {"seconds": None, "flops": 2.5e14, "images": None}
    assert summary.budget_of(result(4, {}, flops)) == "250 TFLOP"
    images = {"seconds": None, "flops": None, "images": 1_280_000}
    assert summary.budget_of(result(4, {}, images)) == "1,280,000 images"


def test_comparisons_of_other_data_or_widths_do_not_share_a_line():
    one = result(64, {"msm": ("msm", 0.2, [0.1, 0.2])})
    other = json.loads(json.dumps(one))
    common = {"data": {"source": "faces", "image_size": 64}, "model": {"hidden_size": 256}}
    other["spec"]["common"] = common
    panels = {summary._panel(gain) for gain in summary.gains({"one": one, "other": other})}
    assert panels == {
        ("", "seconds", "heldout"),
        ("faces, 64 px, width 256", "seconds", "heldout"),
    }


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    one = {"few": result(64, {"msm": ("msm", 0.2, [0.1, 0.2])})}
    made = summary.write(one, tmp_path / "one")
    assert [path.name for path in made] == ["summary.md", "crossover.png"]
    tails = {f"tail-{t}": ("msm", t, [0.1 + t, 0.2]) for t in (0.0, 0.1, 0.4)}
    made = summary.write({**one, "tails": result(64, tails)}, tmp_path / "two")
    assert [path.name for path in made] == ["summary.md", "crossover.png", "tails.png"]
    assert all(path.stat().st_size > 500 for path in made)
    summary.require_target(tmp_path / "two")  # it may replace its own
    (tmp_path / "two" / "summary.md").write_text("### my notes")
    with pytest.raises(UsageError, match=r"summary.md is there already, and was not written"):
        summary.require_target(tmp_path / "two")
    summary.require_target(tmp_path / "two", overwrite=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"arms": {}}', '{"arms": 3, "spec": 1}'])
def test_another_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "compare.json"
    path.write_text(text)
    with pytest.raises(MsmdiffError, match=r"compare.json is "):
        summary.read(path)


def test_every_spec_of_the_page_can_be_read_and_has_a_dense_arm_first():
    found = sorted(PAGE.glob("*.yaml"))
    assert len(found) >= 8
    for path in found:
        spec = specs.read(path)
        assert next(iter(spec.arms)) == "dense"
        assert len(spec.seeds) >= 3


def test_the_page_shows_what_the_stored_results_say():
    results = {path.stem: summary.read(path) for path in sorted(PAGE.glob("*.json"))}
    if results:
        assert (PAGE / "summary.md").read_text() == summary.markdown(results)
    for path in PAGE.glob("*.json"):
        spec = specs.read(path.with_suffix(".yaml")).model_dump(mode="json")
        assert json.loads(path.read_text())["spec"]["arms"] == spec["arms"]


def test_the_page_of_blocks_shows_what_is_stored():
    page = BLOCKS.with_suffix(".md").read_text()
    stored = sorted(BLOCKS.glob("*.json"))
    assert stored
    for path in stored:
        content = json.loads(path.read_text())
        spec = specs.read(path.with_suffix(".yaml")).model_dump(mode="json")
        assert content["spec"]["arms"] == spec["arms"]
        for arm in content["arms"].values():
            assert ", ".join(f"{value:.4f}" for value in arm["values"]) in page
