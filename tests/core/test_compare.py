"""Comparisons: budgets, turns, figures, and a rerun that ends with the same bits."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from msmdiff.core import build, compare
from msmdiff.core.compare import figures, planning
from msmdiff.core.compare import spec as specs
from msmdiff.core.compare.figures import Turn
from msmdiff.core.data import images
from msmdiff.core.errors import UsageError

TINY = {
    "data": {"source": "digits:train", "image_size": 8},
    "model": dict(name=None, family="uvit", hidden_size=16, depth=3, num_heads=2, patch_size=2),
    "train": {"batch_size": 16, "precision": "fp32"},
    "process": {"prediction": "x0"},
    "sample": {"steps": 3},
}
ARMS = {
    "dense": {},
    "masked": {"mask": {"ratio": 0.75, "tail": 0.5}, "objective": {"name": "msm"}},
    "chain": [
        {"share": 0.25, "mask": {"ratio": 0.75}, "objective": {"name": "msm"}},
        {"share": 0.75},
    ],
}


def spec_of(**changes):
    content = {
        "arms": ARMS,
        "common": TINY,
        "budget": {"images": 320},
        "seeds": [0],
        "slice": 1e-4,  # a step each
        "measure": {"points": 2, "n": 16},
    }
    return specs.Spec.model_validate({**content, **changes})


def weights_of(out):
    return {
        str(path.relative_to(out)): load_file(path)
        for path in sorted(out.glob("*/*/stage-*/weights.safetensors"))
    }


def test_a_budget_of_flops_is_the_same_for_all():
    arms = planning.plan(spec_of(budget={"flops": 2e10}), print)
    spent = {arm.name: sum(s.steps * s.flops_per_step for s in arm.stages) for arm in arms}
    for name, flops in spent.items():
        assert flops == pytest.approx(2e10, rel=0.02), name
    steps = {arm.name: sum(s.steps for s in arm.stages) for arm in arms}
    assert steps["masked"] > 1.3 * steps["dense"]


def test_a_budget_of_images_is_divided_by_the_shares():
    arms = {arm.name: [s.steps for s in arm.stages] for arm in planning.plan(spec_of(), print)}
    assert arms == {"dense": [20], "masked": [20], "chain": [5, 15]}


def test_a_budget_of_seconds_follows_the_paces(monkeypatch):
    """A step of every token takes 10 ms here, a masked one 2 ms."""

    def pace(training):
        return 0.002 if training.config.mask.ratio else 0.010

    monkeypatch.setattr(planning, "_pace", pace)
    arms = planning.plan(spec_of(budget={"seconds": 6}), lambda text: None)
    steps = {arm.name: [s.steps for s in arm.stages] for arm in arms}
    assert steps == {"dense": [600], "masked": [1000], "chain": [750, 450]}


def test_no_arm_is_timed_while_it_decodes_images_for_the_others(monkeypatch):
    """Images are cropped once: not within the steps of the arm that comes first."""
    cropped, timed = [], []
    original = images.center_crop
    monkeypatch.setattr(images, "center_crop", lambda *a: cropped.append(1) or original(*a))

    def pace(training):
        before = len(cropped)
        training()
        timed.append(len(cropped) - before)
        return 0.01

    monkeypatch.setattr(planning, "_pace", pace)
    planning.plan(spec_of(budget={"seconds": 1}), lambda text: None)
    assert cropped
    assert timed == [0] * 5 * planning.TIMING_ROUNDS  # masked has two kinds of step, chain two


def test_a_decay_ends_with_the_plan_unless_a_length_was_given():
    """A preset's or the default's number of steps says nothing of the training that is planned."""
    cosine = {"schedule": "cosine"}
    spec = spec_of(
        arms={"whole": {"optim": cosine}, "given": {"optim": cosine | {"decay_steps": 7}}}
    )
    for arm, length in zip(planning.plan(spec, print), (20, 7), strict=True):
        resolved = build.resolve(arm.stages[0].config, 10)
        assert resolved.optim.decay_steps == length


def test_an_arm_tells_how_it_hides_tokens():
    arms = {arm.name: arm.masking() for arm in planning.plan(spec_of(), print)}
    assert arms["dense"] == {"tokens": 16, "hidden": 0.0, "route": None, "unmasked": 1.0}
    assert arms["masked"] == {"tokens": 16, "hidden": 0.75, "route": "msm", "unmasked": 0.5}
    assert arms["chain"]["unmasked"] == pytest.approx(0.75)


def test_slices_add_up_to_the_budget_and_every_arm_is_measured(tmp_path, quiet):
    comparison = compare.Comparison(spec_of(seeds=[0, 1]), tmp_path / "c", quiet)
    outcome = comparison.run()
    for arm in ARMS:
        for seed in (0, 1):
            turns = [t for t in comparison.turns if (t.arm, t.seed) == (arm, seed)]
            assert sum(turn.steps for turn in turns) == 20
            points = outcome.arms[arm]["curves"][seed]
            assert [point["passed"] for point in points] == [0.5, 1.0]
            assert [point["images"] for point in points] == [160, 320]
            assert points[-1]["flops"] == pytest.approx(sum(turn.flops for turn in turns))
            assert points[-1]["seconds"] == pytest.approx(sum(turn.seconds for turn in turns))
        assert len(set(outcome.arms[arm]["values"])) == 2
    rounds = [[t.arm for t in comparison.turns if (t.seed, t.round) == (0, n)] for n in range(4)]
    assert all(sorted(names) == sorted(ARMS) for names in rounds)
    assert rounds[0] != rounds[1]  # another one begins
    comparison.draw(outcome)
    assert (tmp_path / "c" / "curves.png").stat().st_size > 1000
    stored = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert (stored["by"], stored["seeds"]) == ("distance", [0, 1])
    dense = stored["arms"]["dense"]
    for metric in ("distance", "heldout"):
        ends = [dense["curves"][seed][-1][metric] for seed in ("0", "1")]
        assert dense["measured"][metric]["values"] == ends


def test_a_comparison_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    tmp_path, quiet, monkeypatch
):
    straight = compare.Comparison(spec_of(), tmp_path / "straight", quiet).run()
    original, taken = compare.Comparison._take, []

    def interrupted(self, lane, number):
        original(self, lane, number)
        taken.append(1)
        if len(taken) in (7, 30):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(compare.Comparison, "_take", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare.Comparison(spec_of(), tmp_path / "stopped", quiet).run()
    outcome = compare.Comparison(spec_of(), tmp_path / "stopped", quiet).run()
    ours, theirs = weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped")
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4
    for name, tensors in ours.items():
        assert all(torch.equal(tensors[key], theirs[name][key]) for key in tensors), name
    for arm in ARMS:
        assert outcome.arms[arm]["values"] == straight.arms[arm]["values"]


def test_every_arm_tries_the_same_learning_rates(tmp_path, quiet):
    spec = spec_of(arms={"dense": {}}, sweep=[1e-3, 1e-9], seeds=[3, 4])
    outcome = compare.Comparison(spec, tmp_path / "c", quiet).run()
    tuning = outcome.arms["dense"]["tuning"]
    assert tuning["chosen"] == min(tuning["learning_rates"], key=tuning["learning_rates"].get) or (
        f"{tuning['chosen']:g}" == min(tuning["learning_rates"], key=tuning["learning_rates"].get)
    )
    assert len(outcome.arms["dense"]["values"]) == 2


def test_another_comparison_or_foreign_folder_is_refused(tmp_path, quiet):
    compare.Comparison(spec_of(arms={"dense": {}}), tmp_path / "c", quiet)
    with pytest.raises(UsageError, match="holds another comparison"):
        compare.Comparison(spec_of(), tmp_path / "c", quiet)
    for name in ("dense/thesis.txt", "samples.png"):
        theirs = tmp_path / name.replace("/", "-") / name
        theirs.parent.mkdir(parents=True)
        theirs.write_text("mine")
        with pytest.raises(UsageError, match="no comparison wrote it: give another --out"):
            compare.Comparison(spec_of(), tmp_path / name.replace("/", "-"), quiet)
        assert theirs.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arms: {a: {}}\nbudget: {seconds: 1, images: 2}", "one of seconds, flops and images"),
        ("arms: {a: {}}", "budget: Field required"),
        ("arms: {}\nbudget: {images: 2}", "arms"),
        ("arms: {a: {}}\nbudget: {images: 2}\nsliec: 3", "sliec"),
        ("arms: [", "spec.yaml"),
    ],
)
def test_a_wrong_spec_is_one_sentence_that_names_the_file(tmp_path, text, words):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        specs.read(path)
    assert "spec.yaml" in str(caught.value)


def test_shares_and_configurations_are_checked_before_training():
    with pytest.raises(UsageError, match=r"arms.a: the shares \[0.3, 0.3\] .* add up to 1"):
        planning.plan(spec_of(arms={"a": [{"share": 0.3}, {"share": 0.3}]}), print)
    with pytest.raises(UsageError, match=r"arms.a: .*maks"):
        planning.plan(spec_of(arms={"a": {"maks": {}}}), print)


def turn(arm, number, steps, seconds, piece=0):
    return Turn(arm=arm, seed=0, round=number, piece=piece, steps=steps, seconds=seconds, flops=0.0)


def test_ratios_of_speed_come_from_pairs_of_turns():
    """The machine halves its speed in every other round, and the ratio stays three."""
    turns = []
    for number in range(10):
        slow = 1 + number % 2
        turns += [turn("a", number, 10, slow), turn("b", number, 30, slow)]
    turns.append(turn("b", 99, 500, 1))  # without a pair
    turns.append(turn("a", 98, 5, 1))
    turns.append(turn("b", 98, 5, 1, piece=1))  # another kind of step
    found = figures.speed(turns, ["a", "b"])
    assert found["b"] == {"median": 3.0, "low": 3.0, "high": 3.0, "pairs": 10}


def test_unsteadiness_is_beside_each_kinds_own_median():
    steady = [turn(arm, n, 10, pace) for n in range(20) for arm, pace in (("a", 1.0), ("b", 9.0))]
    assert figures.unsteadiness(steady) == pytest.approx(0)
    hiccups = [turn("a", n, 10, 3.0 if n % 5 == 0 else 1.0) for n in range(20)]
    assert figures.unsteadiness(hiccups) == pytest.approx(2.0)


def test_the_interval_is_students():
    low, high = figures.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    assert figures.interval([1.0]) is None
