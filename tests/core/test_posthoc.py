"""Averages of any width, made after a training from its snapshots."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msmdiff.cli.averages import ema as command
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import weights
from msmdiff.core.config import section
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics import evaluate, features, inputs, scores
from msmdiff.core.training import checkpoint, memory, posthoc
from msmdiff.core.training.ema import Averages
from msmdiff.core.training.step import Step
from msmdiff.core.training.trainer import Trainer, train

SMALL = {
    "model": {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3},
    "optim": {"lr": 2e-4},
    "train": {"batch_size": 4, "steps": 32, "preview_every": 0, "checkpoint_every": 100},
    "ema": {"decays": [0.9], "snapshots_every": 2},
    "eval": {"heldout_every": 0},
}


def small(*layers):
    return configuration.build(SMALL, *layers)


# ------------------------------------------------------------------ the mathematics


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, 0.72)])
def test_the_exponent_has_the_relative_width(width, gamma):
    """The standard deviation of the density (gamma + 1) u^gamma over [0, 1] is the width."""
    found = posthoc.exponent(width)
    assert found == pytest.approx(gamma, abs=0.01)
    mean = (found + 1) / (found + 2)
    assert ((found + 1) / (found + 3) - mean**2) ** 0.5 == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", [0.05, 0.2])
def test_a_profile_is_what_the_updates_come_to(width):
    """beta_t = (1 - 1/t)^(gamma + 1), applied one after another to unit vectors."""
    gamma, held = posthoc.exponent(width), np.zeros(30)
    for t in range(1, 31):
        beta = (1 - 1 / t) ** (gamma + 1)
        held = beta * held + (1 - beta) * np.eye(30)[t - 1]
    found = posthoc.profile(30, gamma, np.arange(1.0, 41.0))
    np.testing.assert_allclose(found[:30], held, rtol=1e-10, atol=1e-14)
    assert (found[30:] == 0).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_inner_products_are_the_papers_in_the_limit_of_many_steps():
    """Karras et al. 2024, appendix C.3: (a + 1)(b + 1) (ta / tb)^e / ((a + b + 1) max(ta, tb))."""
    steps = np.arange(1.0, 100_001.0)
    for (ta, a), (tb, b) in [((100_000, 7.0), (60_000, 17.0)), ((50_000, 17.0), (90_000, 7.0))]:
        exact = float(posthoc.profile(ta, a, steps) @ posthoc.profile(tb, b, steps))
        power = b if ta < tb else -a
        limit = (a + 1) * (b + 1) * (ta / tb) ** power / ((a + b + 1) * max(ta, tb))
        assert exact == pytest.approx(limit, rel=1e-3)


def test_factors_sum_to_one_and_find_what_is_kept():
    kept = [(step, posthoc.exponent(w)) for step in range(5, 101, 5) for w in (0.05, 0.1)]
    for width, error in ((0.1, 1e-7), (0.07, 3e-3), (0.15, 6e-3), (0.03, 0.03)):
        found = posthoc.solve(kept, (100, posthoc.exponent(width)))
        assert found.factors.sum() == pytest.approx(1, abs=1e-9)
        assert found.error < error
    exact = posthoc.solve(kept, (100, posthoc.exponent(0.1))).factors
    np.testing.assert_allclose(exact, [0] * 39 + [1], atol=1e-6)
    few = posthoc.solve(kept[-2:], (100, posthoc.exponent(0.25)))
    assert few.error > 0.3  # which two averages cannot be made into


# ------------------------------------------------------------------ a training


WIDTHS = (0.04, 0.07, 0.1, 0.15, 0.2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with snapshots, and averages of its network that were kept beside it, in float64: of
    all widths at its end, and of one in the middle.
    """
    folder, direct, middle = tmp_path_factory.mktemp("snapshots") / "run", {}, {}
    take = Step.__call__

    def watched(step, batches, images_seen):
        taken = take(step, batches, images_seen)
        t = images_seen // 4 + 1
        for width in WIDTHS:
            beta = (1 - 1 / t) ** (posthoc.exponent(width) + 1)
            for name, value in step.parts.backbone.state_dict().items():
                held = direct.setdefault(width, {}).get(name, torch.zeros(()).double())
                direct[width][name] = beta * held + (1 - beta) * value.double()
        if t == 20:
            middle.update(direct[0.15])
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", watched)
        train(small(), folder, Silent())
    return folder, direct, middle


class Silent:
    def note(self, text):
        pass

    def progress(self, *_):
        pass

    def activity(self, *_):
        pass


@pytest.mark.parametrize("width", WIDTHS)
def test_it_equals_the_average_that_was_kept_directly(trained, width):
    folder, direct, _ = trained
    made = posthoc.combine(folder, width)
    assert (made.images, made.used) == (128, 32)
    assert made.tensors.keys() == direct[width].keys()
    last = load_file(checkpoint.newest(folder) / "model.safetensors")
    for name, value in made.tensors.items():
        assert value.dtype == last[name].dtype
        torch.testing.assert_close(value.double(), direct[width][name], rtol=0, atol=1e-6)
    apart = max((value - last[name]).abs().max().item() for name, value in made.tensors.items())
    assert apart > 1e-4  # the weights themselves are another thing


def test_it_may_stand_in_the_middle_of_the_training(trained, tmp_path):
    """Only snapshots up to there count: the same without the later ones."""
    folder, _, middle = trained
    made = posthoc.combine(folder, 0.15, images=80)
    assert made.used == 20
    for name, value in made.tensors.items():
        torch.testing.assert_close(value.double(), middle[name], rtol=0, atol=1e-6)
    shutil.copytree(folder / "snapshots", tmp_path / "snapshots")
    posthoc.forget(tmp_path, 80)
    assert len(posthoc.snapshots(tmp_path)) == 20
    again = posthoc.combine(tmp_path, 0.15)
    assert all(torch.equal(again.tensors[name], value) for name, value in made.tensors.items())


def test_a_snapshot_and_the_checkpoint_hold_the_same_average(trained):
    folder, _, _ = trained
    for width in ("0.05", "0.1"):
        kept = weights.read(folder / "snapshots" / f"img-000000128-width-{width}.safetensors")
        saved = load_file(checkpoint.newest(folder) / f"width-{width}.safetensors")
        assert all(torch.equal(value, saved[name]) for name, value in kept.tensors.items())
        assert kept.notes["updates"] == "32"
    published = load_file(folder / "weights.safetensors")
    average = load_file(checkpoint.newest(folder) / "ema-0.9.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in published.items())


def test_a_kill_loses_no_snapshot_and_a_resumed_run_makes_the_same(trained, tmp_path, quiet):
    """Stopped between a snapshot and its checkpoint: what lies past the checkpoint is made again,
    to the last bit, and what lies before stays.
    """
    folder, _, _ = trained
    config = small({"train": {"checkpoint_every": 3}})
    save, run = checkpoint.save, tmp_path / "run"

    def killed(**what):
        if what["images_seen"] > 24:
            raise KeyboardInterrupt
        return save(**what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, run, quiet)
    assert checkpoint.newest(run).name == "img-000000024"
    assert [each.step for each in posthoc.snapshots(run)] == [2, 2, 4, 4, 6, 6, 8, 8]
    (run / "snapshots" / ".img-000000040-width-0.1.safetensors.part").write_bytes(b"torn")
    train(config, run, quiet)
    assert not list((run / "snapshots").glob(".*"))
    straight = {snapshot.path.name: load_file(snapshot.path) for snapshot in
                posthoc.snapshots(folder)}  # fmt: skip
    resumed = {snapshot.path.name: load_file(snapshot.path) for snapshot in
               posthoc.snapshots(run)}  # fmt: skip
    assert resumed.keys() == straight.keys()
    for name, tensors in straight.items():
        assert all(torch.equal(resumed[name][key], value) for key, value in tensors.items()), name


def test_an_end_between_two_snapshots_has_one_of_its_own(tmp_path, quiet):
    train(small({"train": {"steps": 3}}), tmp_path, quiet)
    assert sorted({each.step for each in posthoc.snapshots(tmp_path)}) == [2, 3]


def test_without_snapshots_nothing_is_kept(tmp_path, quiet):
    trainer = Trainer(small({"ema": {"snapshots_every": 0}, "train": {"steps": 2}}),
                      tmp_path, quiet, False, "")  # fmt: skip
    assert list(trainer.step.averages.copies()) == list(trainer.step.averages.networks.values())
    trainer.fit()
    trainer.close()
    assert not (tmp_path / "snapshots").exists()
    with pytest.raises(UsageError, match=r"has no snapshots: train it with --set ema.snapshots"):
        posthoc.combine(tmp_path, 0.1)


def test_what_there_is_not_is_named(trained):
    folder, _, _ = trained
    with pytest.raises(UsageError, match=r"--images 101: .* no snapshot there; the nearest is at"):
        posthoc.combine(folder, 0.1, images=101)
    with pytest.raises(UsageError, match=r"--width 0.3: give a number above 0 and up to 0.28"):
        posthoc.combine(folder, 0.3)
    with pytest.raises(UsageError, match=r"ema\.widths\.0 = 0\.5: input should be less than or"):
        section("ema", widths=[0.5])


def test_a_damaged_snapshot_is_named(trained, tmp_path):
    shutil.copytree(trained[0] / "snapshots", tmp_path / "snapshots")
    path = tmp_path / "snapshots" / "img-000000080-width-0.1.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(MsmdiffError, match=r"img-000000080-width-0\.1"):
        posthoc.combine(tmp_path, 0.07)


def test_averages_of_snapshots_follow_their_definition():
    network = torch.nn.Linear(1, 1, bias=False)
    averages = Averages(network, section("ema", decays=[], snapshots_every=1, widths=[0.1]))
    expected = 0.0
    for t in range(1, 20):
        network.weight.data.fill_(t**1.5)
        averages.update()
        beta = (1 - 1 / t) ** (posthoc.exponent(0.1) + 1)
        expected = beta * expected + (1 - beta) * t**1.5
    assert averages.of_snapshots["0.1"].weight.item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ the command


def test_the_command_writes_an_average_that_samples(trained, tmp_path, cli):
    folder, out = trained[0], tmp_path / "average.safetensors"
    done = cli("weights", "ema", str(folder), "--width", "0.15", "-o", str(out))
    assert "the average of width 0.15 at image 128, from 32 snapshots" in done.stderr + done.stdout
    expected = posthoc.combine(folder, 0.15).tensors
    assert all(torch.equal(value, expected[name]) for name, value in load_file(out).items())
    assert weights.read(out).notes["width"] == "0.15"
    assert weights.load(out).draw(1).shape == (1, 3, 16, 16)
    (tmp_path / "mine.safetensors").write_bytes(b"something else")
    with pytest.raises(UsageError, match="was not written by msmdiff"):
        command(str(folder), width=0.15, out=tmp_path / "mine.safetensors")


def test_the_curve_is_of_what_each_average_draws(trained, tmp_path, capsys):
    """The distance of an average is that of the file that is written of it."""
    folder, picture = trained[0], tmp_path / "widths.png"
    command(str(folder), widths="0.05,0.2", data="digits:test", n=4, out=picture,
            sets=["sample.steps=2"])  # fmt: skip
    shown = capsys.readouterr().out.splitlines()
    network = features.build("pixel")
    reference = evaluate.of_input(inputs.open_input("digits:test", crop=16), network)
    for width in (0.05, 0.2):
        out = tmp_path / f"{width}.safetensors"
        command(str(folder), width=width, out=out)
        layers = [{"sample": {"steps": 2}}]
        drawn = evaluate.of_input(inputs.open_input(str(out), n=4, layers=layers), network)
        value = scores.compare(drawn, reference, network).value
        (row,) = [line.split() for line in shown if line.split()[:1] == [f"{width:g}"]]
        assert float(row[1]) == pytest.approx(value, rel=1e-3)
    assert Image.open(picture).size[0] > 300


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give --width W to write an average, or --widths A,B,C"),
        ({"widths": "0.1"}, "--widths needs images to compare with"),
        ({"widths": "a,b", "data": "digits:test"}, "--widths a,b: give numbers such as"),
        ({"width": 0.5}, "--width 0.5: give a number above 0 and up to 0.28"),
        ({"width": 0.1, "n": 10}, "--n has no effect with --width: leave it out, or use --widths"),
    ],
)
def test_a_wrong_command_is_one_sentence(trained, given, words):
    with pytest.raises(UsageError, match=words):
        command(str(trained[0]), **given)


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="'nothing' is no run, here or under runs/"):
        command("nothing", width=0.1)


def test_the_estimate_of_memory_counts_both_averages():
    kept, none = (
        memory.estimate(road.resolve(small({"ema": {"snapshots_every": every}})), device="cpu")
        for every in (4, 0)
    )
    assert kept.averages == 3 * kept.weights
    assert none.averages == none.weights
