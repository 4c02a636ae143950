import json
import os
import shutil
import signal
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets, weights
from msmdiff.core.config import section
from msmdiff.core.diffusion import objectives, time_sampling
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.training import checkpoint, cost, evaluation, optim, origins, previews
from msmdiff.core.training.ema import Averages, progress
from msmdiff.core.training.run import Run
from msmdiff.core.training.step import Step
from msmdiff.core.training.trainer import Trainer, train

SMALL = {
    "model": {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3},
    "train": {
        "batch_size": 8,
        "steps": 8,
        "log_every": 1,
        "preview_every": 0,
        "checkpoint_every": 100,
    },
    "objective": {"name": "msm"},
    "mask": {"ratio": 0.75},
    "data": {"hflip": 0.5},
}


def small(*layers):
    return configuration.build(SMALL, *layers)


def final_state(run):
    """Every number that a run ends with: weights, averages, optimiser."""
    path = checkpoint.newest(run)
    state, networks = checkpoint.load(path)
    flat = {f"{stem}/{k}": v for stem, tensors in networks.items() for k, v in tensors.items()}
    for i, values in state["optimizer"]["state"].items():
        flat |= {f"optimizer/{i}/{k}": v for k, v in values.items() if torch.is_tensor(v)}
    return state["images_seen"], flat


def assert_same_bits(a, b):
    (images_a, numbers_a), (images_b, numbers_b) = final_state(a), final_state(b)
    assert images_a == images_b
    assert numbers_a.keys() == numbers_b.keys()
    assert all(torch.equal(numbers_a[k], numbers_b[k]) for k in numbers_a)
    losses = [[line["loss"] for line in Run(r, writes=False).metrics()] for r in (a, b)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("codec", [{}, {"codec": {"name": "dwt"}}], ids=["pixel", "dwt"])
@pytest.mark.parametrize("ema", [[0.999], [], [0.9, 0.99]], ids=["ema", "no-ema", "two-emas"])
@pytest.mark.parametrize("optimiser", ["adamw", "adan", "muon"])
def test_three_plus_five_steps_equal_eight(tmp_path, quiet, codec, ema, optimiser):
    layers = codec, {"ema": {"decays": ema, "update_after_step": 2}, "optim": {"name": optimiser}}
    train(small(*layers), tmp_path / "straight", quiet)
    train(small(*layers, {"train": {"steps": 3}}), tmp_path / "resumed", quiet)
    assert final_state(tmp_path / "resumed")[0] == 24
    train(small(*layers), tmp_path / "resumed", quiet)
    assert any("resuming" in note for note in quiet.notes)
    assert_same_bits(tmp_path / "straight", tmp_path / "resumed")


TINY_EDT = {
    "family": "edt",
    "depth": None,
    "num_heads": None,
    "stage_widths": [16] * 5,
    "stage_depths": [1] * 5,
    "stage_heads": [2] * 5,
}
TINY_MDT = {"family": "mdtv2", "depth": 4, "num_heads": 2, "decode_layers": 2}


@pytest.mark.parametrize("family", [TINY_EDT, TINY_MDT], ids=["edt", "mdtv2"])
def test_both_passes_and_the_history_of_losses_resume_exactly(tmp_path, quiet, monkeypatch, family):
    # So that a short run leaves the uniform phase.
    monkeypatch.setattr(time_sampling, "RECORDED", 1)
    model = {
        "name": None,
        "patch_size": 2,
        "hidden_size": 16,
        "learn_sigma": True,
        "num_classes": "auto",
        **family,
    }
    layers = (
        {
            "model": model,
            "objective": {"name": "auto"},
            "mask": {"ratio": 0.0},
            "data": {"hflip": 0.0},
        },
        {
            "process": {
                "schedule": "linear",
                "timesteps": 25,
                "time_sampling": "loss_second_moment",
            },
            "sample": {"steps": 5},
        },
    )
    train(small(*layers, {"train": {"steps": 20}}), tmp_path / "straight", quiet)
    train(small(*layers, {"train": {"steps": 16}}), tmp_path / "resumed", quiet)
    train(small(*layers, {"train": {"steps": 20}}), tmp_path / "resumed", quiet)
    assert_same_bits(tmp_path / "straight", tmp_path / "resumed")
    states = [
        checkpoint.load(checkpoint.newest(tmp_path / run))[0]["times"]
        for run in ("straight", "resumed")
    ]
    assert torch.equal(states[0]["losses"], states[1]["losses"])
    assert states[0]["counts"].min() == 1
    last = Run(tmp_path / "straight", writes=False).metrics()[-1]
    assert "masked_vb" in last
    assert (last["mask_ratio"] == 0) == (family is TINY_EDT)
    assert family is TINY_EDT or 0.3 < last["mask_ratio"] < 0.5


def test_a_run_killed_between_checkpoints_ends_with_the_same_bits(tmp_path, quiet, monkeypatch):
    layers = ({"train": {"checkpoint_every": 2, "micro_batch_size": 4, "precision": "bf16"}},)
    train(small(*layers), tmp_path / "straight", quiet)
    step = Trainer._take_step

    def killed(self, batches):
        if self.images_seen == 5 * 8:
            raise RuntimeError("killed")
        step(self, batches)

    monkeypatch.setattr(Trainer, "_take_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(small(*layers), tmp_path / "killed", quiet)
    monkeypatch.setattr(Trainer, "_take_step", step)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"images": 48, "lo')  # torn by the kill
    newest = checkpoint.newest(tmp_path / "killed")
    assert newest.name == "img-000000032"
    train(small(*layers), tmp_path / "killed", quiet)
    assert_same_bits(tmp_path / "straight", tmp_path / "killed")


def test_micro_batches_add_up_to_the_batch(tmp_path, quiet):
    """Two micro-batches draw their own noise, so compare against gradients averaged by hand over
    the same chunks.
    """
    trainer = Trainer(small({"train": {"micro_batch_size": 4}}), tmp_path / "a", quiet, False, "")
    from msmdiff.core.data.loader import batches

    stream = batches(trainer.dataset, trainer._chunks(), pin_memory=False)
    chunks = [next(stream), next(stream)]
    expected = []
    for batch in chunks:
        trainer.step.model.zero_grad()
        trainer.step.accumulate = 1
        trainer.step._backward(batch)
        expected.append([p.grad.clone() for p in trainer.step.model.parameters()])
    trainer.step.model.zero_grad()
    for batch in chunks:
        trainer.step.accumulate = 2
        trainer.step._backward(batch)
    for p, a, b in zip(trainer.step.model.parameters(), *expected, strict=True):
        torch.testing.assert_close(p.grad, (a + b) / 2, rtol=1e-5, atol=1e-7)
    trainer.close()


def test_a_changed_configuration_is_refused_with_its_differences(tmp_path, quiet):
    train(small({"train": {"steps": 1}}), tmp_path, quiet)
    with pytest.raises(UsageError, match=r"optim.weight_decay: 0.03 there, 0.5 now.*another --run"):
        train(small({"optim": {"weight_decay": 0.5}}), tmp_path, quiet)
    train(small({"train": {"steps": 2, "log_every": 5}}), tmp_path, quiet)
    assert final_state(tmp_path)[0] == 16


def test_one_process_a_run(tmp_path, quiet):
    first = Run(tmp_path)
    with pytest.raises(MsmdiffError, match="another process is training in"):
        train(small(), tmp_path, quiet)
    first.close()
    train(small({"train": {"steps": 1}}), tmp_path, quiet)


def test_a_non_finite_loss_stops_before_the_update(tmp_path, quiet, monkeypatch):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    before = final_state(tmp_path)
    monkeypatch.setattr(
        objectives.Objective,
        "terms",
        lambda self, model, x0, *_: {
            "loss": model(x0, torch.zeros(8)).flatten(1).sum(1) * float("nan")
        },
    )
    with pytest.raises(
        MsmdiffError, match=r"before the update at image 16: loss nan.*img-000000016"
    ):
        train(small(), tmp_path, quiet)
    assert all(torch.equal(before[1][k], v) for k, v in final_state(tmp_path)[1].items())


@pytest.mark.parametrize("log_every", [1, 100])
def test_what_the_device_leaves_out_stops_the_run_a_step_later(
    tmp_path, quiet, monkeypatch, log_every
):
    """As on a GPU, where nobody waits for the norm: the weights keep what they were."""
    monkeypatch.setattr(Step, "_can_defer", lambda self, optimizer: True)
    original, calls = objectives.Objective.terms, []

    def sometimes(self, *arguments):
        calls.append(1)
        scale = float("nan") if len(calls) == 3 else 1.0
        return {name: value * scale for name, value in original(self, *arguments).items()}

    monkeypatch.setattr(objectives.Objective, "terms", sometimes)
    layer = {"train": {"log_every": log_every, "checkpoint_every": 2}}
    with pytest.raises(MsmdiffError, match=r"before the update at image 16: loss nan.*000000016"):
        train(small(layer), tmp_path / "stopped", quiet)
    assert len(calls) == (3 if log_every == 1 else 4)
    assert final_state(tmp_path / "stopped")[0] == 16
    monkeypatch.undo()
    train(small(layer), tmp_path / "stopped", quiet)
    train(small(layer), tmp_path / "straight", quiet)
    assert all(
        torch.equal(v, final_state(tmp_path / "straight")[1][k])
        for k, v in final_state(tmp_path / "stopped")[1].items()
    )


def test_pictures_never_compile_the_network_in_training(tmp_path, quiet):
    """Its bits would depend on whether a picture came before."""
    layer = {"train": {"preview_every": 2, "steps": 4}, "ema": {"decays": []}}
    quick = {"sample": {"steps": 2, "compile": True}}
    train(small(layer, quick), tmp_path / "compiled", quiet)
    train(small(layer, {"sample": {"steps": 2}}), tmp_path / "plain", quiet)
    assert list((tmp_path / "compiled" / "previews").iterdir())
    assert_same_bits(tmp_path / "compiled", tmp_path / "plain")


def test_columns_are_named_where_every_class_has_one(monkeypatch):
    told = []
    monkeypatch.setattr(previews, "labelled", lambda picture, **words: told.append(words))

    class Model:
        config = small()

    for count in (10, 12):
        previews._captioned(None, Model, [f"c{i}" for i in range(count)])
    assert [len(words["columns"]) for words in told] == [10, 0]


def test_a_fused_optimiser_leaves_out_what_is_not_finite():
    """Bits of weights and moments, and the count of steps."""
    network = torch.nn.Linear(4, 4)
    optimizer = optim.build(section("optim", lr=0.1), network.parameters())
    for scale, found in ((1.0, 0.0), (float("nan"), 1.0)):
        before = [p.detach().clone() for p in network.parameters()]
        (network(torch.ones(2, 4)).sum() * scale).backward()
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        optimizer.zero_grad()
        kept = [torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
        assert kept == [bool(found)] * 2
    assert [state["step"].item() for state in optimizer.state.values()] == [1, 1]


def test_skipping_is_opt_in_and_counted(tmp_path, quiet, monkeypatch):
    original = objectives.Objective.terms
    calls = []

    def sometimes(self, *arguments):
        calls.append(1)
        scale = float("inf") if len(calls) == 2 else 1.0
        return {name: value * scale for name, value in original(self, *arguments).items()}

    monkeypatch.setattr(objectives.Objective, "terms", sometimes)
    train(small({"train": {"on_nonfinite": "skip", "steps": 4}}), tmp_path, quiet)
    assert [line["skipped_steps"] for line in Run(tmp_path, writes=False).metrics()] == [0, 1, 1, 1]
    assert all(
        torch.isfinite(v).all() for v in load_file(tmp_path / "weights.safetensors").values()
    )


def stopped_at(images, quiet):
    """A reporter that asks for the end when so many images were seen."""

    class Impatient(type(quiet)):
        def progress(self, images_seen, total, metrics):
            if images_seen == images:
                os.kill(os.getpid(), signal.SIGTERM)

    return Impatient()


def test_the_mask_over_the_training_resumes_exactly(tmp_path, quiet):
    mask = {"schedule": "linear", "final_ratio": 0.5, "levels": 2, "tail": 0.25}
    config = small({"mask": mask})
    train(config, tmp_path / "straight", quiet)
    ratios = [line["mask_ratio"] for line in Run(tmp_path / "straight", writes=False).metrics()]
    assert ratios == [0.75] * 3 + [0.5] * 3 + [0] * 2
    for images in (16, 24, 48):  # within the first stage, at its end, at the tail's beginning
        run = tmp_path / f"stopped-{images}"
        train(config, run, stopped_at(images, quiet))
        train(config, run, quiet)
        assert_same_bits(tmp_path / "straight", run)


@pytest.mark.parametrize("preset", ["digits-edm", "digits-ve"])
def test_a_primer_of_exploding_noise_resumes_exactly(tmp_path, quiet, preset):
    own = {
        "model": {"hidden_size": 16, "depth": 2, "num_heads": 2},
        "mask": {"ratio": 0.75},
        "train": {**SMALL["train"], "steps": 4},
    }
    config = configuration.build(presets.read(preset), own)
    train(config, tmp_path / "straight", quiet)
    train(config, tmp_path / "stopped", stopped_at(16, quiet))
    train(config, tmp_path / "stopped", quiet)
    assert_same_bits(tmp_path / "straight", tmp_path / "stopped")


def test_sigterm_saves_and_the_rest_follows(tmp_path, quiet):
    train(small(), tmp_path / "straight", quiet)
    summary = train(small(), tmp_path / "stopped", stopped_at(24, quiet))
    assert summary.interrupted == signal.SIGTERM
    assert summary.images_seen in (24, 32)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(small(), tmp_path / "stopped", quiet)
    assert_same_bits(tmp_path / "straight", tmp_path / "stopped")


def test_a_second_sigterm_is_no_impatience(tmp_path, quiet):
    """A scheduler and a launcher both send one to each process: the step is ended and saved."""

    class Told(type(quiet)):
        def progress(self, images_seen, total, metrics):
            if images_seen == 24:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)

    summary = train(small(), tmp_path, Told())
    assert (summary.interrupted, final_state(tmp_path)[0]) == (signal.SIGTERM, summary.images_seen)


def test_training_works_off_the_main_thread(tmp_path, quiet):
    thread = threading.Thread(target=train, args=(small({"train": {"steps": 1}}), tmp_path, quiet))
    thread.start()
    thread.join()
    assert final_state(tmp_path)[0] == 8


def test_checkpoints_are_whole_or_passed_over(tmp_path, quiet):
    train(small({"train": {"checkpoint_every": 2, "keep_checkpoints": 3}}), tmp_path, quiet)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["img-000000032", "img-000000048", "img-000000064"]
    (tmp_path / "checkpoints" / names[-1] / "state.pt").write_bytes(b"torn")
    (tmp_path / "checkpoints" / names[-2] / "DONE").unlink()
    assert checkpoint.newest(tmp_path).name == names[0]
    train(small({"train": {"checkpoint_every": 2}}), tmp_path, quiet)
    assert final_state(tmp_path)[0] == 64


@pytest.mark.parametrize("name", ["model.safetensors", "ema-0.999.safetensors", "state.pt"])
def test_a_checkpoint_that_was_changed_is_not_resumed(tmp_path, quiet, name):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    path = checkpoint.newest(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # within the last number, or the end of the zip's table
    path.unlink()  # weights.safetensors is a link to one of them
    path.write_bytes(content)
    with pytest.raises(MsmdiffError, match=rf"{name} has changed since it was written.*remove it"):
        train(small(), tmp_path, quiet)


def test_a_checkpoint_of_before_checksums_is_resumed(tmp_path, quiet):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    done = checkpoint.newest(tmp_path) / "DONE"
    recorded = json.loads(done.read_text())
    assert {len(file["sha256"]) for file in recorded.values()} == {64}
    done.write_text(json.dumps({name: file["bytes"] for name, file in recorded.items()}))
    train(small(), tmp_path, quiet)
    assert "at image 16" in " ".join(quiet.notes)
    assert final_state(tmp_path)[0] == 64


@pytest.mark.parametrize("left", [None, b"", b"\0\0\0"])
def test_a_lost_configuration_is_taken_from_the_newest_checkpoint(tmp_path, quiet, left):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    path = tmp_path / "config.yaml"
    before = path.read_text()
    path.unlink()
    if left is not None:
        path.write_bytes(left)
    with pytest.raises(UsageError, match="was trained with another configuration"):
        train(small({"train": {"steps": 2, "seed": 99}}), tmp_path, quiet)
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    assert "config.yaml is lost or empty: the configuration is taken" in " ".join(quiet.notes)
    assert path.read_text() == before


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, quiet, monkeypatch):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    before = final_state(tmp_path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        MsmdiffError,
        match=r"image 64 could not be written .*No space left.*earlier checkpoints are intact",
    ):
        train(small(), tmp_path, quiet)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["img-000000016"]
    assert all(torch.equal(before[1][k], v) for k, v in final_state(tmp_path)[1].items())


def test_weights_are_the_average_and_describe_themselves(tmp_path, quiet):
    train(small({"ema": {"decays": [0.5, 0.9], "warmup": "constant"}}), tmp_path, quiet)
    folder = checkpoint.newest(tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == (
        folder / "ema-0.5.safetensors"
    ).read_bytes()
    loaded = weights.load(weights.locate(tmp_path))
    assert loaded.config == Run(tmp_path, writes=False).stored_config()
    assert loaded.report == {"images_seen": "64", "weights": "ema-0.5"}
    weights.save(
        tmp_path / "again.safetensors", loaded.backbone.state_dict(), loaded.config, **loaded.report
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "weights.safetensors"
    ).read_bytes()
    assert weights.locate(tmp_path, ema=0.9) == folder / "ema-0.9.safetensors"
    with pytest.raises(UsageError, match=r"no average with decay 0.99"):
        weights.locate(tmp_path, ema=0.99)
    assert not torch.equal(
        load_file(folder / "ema-0.9.safetensors")["norm.weight"], loaded.backbone.norm.weight
    )


@pytest.mark.parametrize("warmup", ["constant", "power"])
def test_averages_follow_their_definition(warmup):

    net = torch.nn.Linear(1, 1, bias=False)
    values = torch.linspace(0, 3, 40).square()
    net.weight.data.fill_(values[0])
    averages = Averages(net, section("ema", decays=[0.9], warmup=warmup, update_after_step=5))
    expected = values[0].item()
    for k, value in enumerate(values[1:]):
        net.weight.data.fill_(value)
        averages.update()
        # ema-pytorch: copies first, then min(1 - (1 + e)^-power, decay)
        ramp = 0.0 if k <= 5 else min(1 - (1 + k - 5) ** (-2 / 3), 0.9)
        decay = 0.9 if warmup == "constant" else ramp
        expected = decay * expected + (1 - decay) * value.item()
        assert averages.networks["0.9"].weight.item() == pytest.approx(expected, rel=1e-5)


def test_published_ema_trajectory(golden):

    tensors = load_file(golden / "maskdm_math" / "io.safetensors")
    values, expected = tensors["ema/values"], tensors["ema/every1_trajectory"]
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(values.flatten()[0])
    averages = Averages(net, section("ema", decays=[0.999]))
    got = []
    for value in values.flatten()[-expected.numel() :]:
        net.weight.data.fill_(value)
        averages.update()
        got.append(averages.networks["0.999"].weight.item())
    torch.testing.assert_close(torch.tensor(got), expected.flatten().float(), atol=1e-5, rtol=1e-4)


def test_learning_rate_is_a_function_of_images_seen():
    constant = section("optim", lr=1.0, warmup_steps=10)
    assert [optim.learning_rate(constant, i * 8, 8) for i in (0, 5, 10, 999)] == [0, 0.5, 1, 1]
    linear = section("optim", lr=1.0, final_lr=0.1, schedule="linear", decay_steps=100)
    assert optim.learning_rate(linear, 50 * 8, 8) == pytest.approx(0.55)
    assert optim.learning_rate(linear, 500 * 8, 8) == pytest.approx(0.1)
    cosine = section("optim", lr=1.0, schedule="cosine", decay_steps=100)
    assert optim.learning_rate(cosine, 25 * 8, 8) == pytest.approx(0.5 + 0.5 * 2**-0.5)


def test_adan_is_the_published_one_and_adan_pytorch_is_not():
    """First step of Adan (Xie et al. 2022) on a constant gradient g: lr (g + 0) / |g| by its bias
    corrections.
    """
    moved = {}
    for name in ("adan", "adan-pytorch"):
        p = torch.nn.Parameter(torch.tensor([1.0]))
        betas = [0.98, 0.92, 0.99]
        optimiser = optim.build(
            section("optim", name=name, lr=0.1, betas=betas, weight_decay=0.0), [p]
        )
        p.grad = torch.tensor([2.0])
        optimiser.step()
        moved[name] = 1.0 - p.item()
    assert moved["adan"] == pytest.approx(0.1, rel=1e-4)
    assert moved["adan-pytorch"] == pytest.approx(0.0, abs=1e-6)


def test_cost_counts_what_the_mask_saves():
    from msmdiff.core import build as road

    config = road.resolve(small({"mask": {"ratio": 0.75}}))
    counted = cost.measure(config)
    assert (counted.tokens, counted.kept) == (64, 16)
    assert 16 / 66 * 0.7 < counted.masked_flops / counted.forward_flops < 18 / 65
    # one Linear by hand: the patch embedding of 64 tokens
    assert counted.forward_flops > 2 * 64 * 12 * 16
    assert counted.parameters == sum(p.numel() for p in road.build(config).backbone.parameters())


def test_previews_show_samples_and_what_the_mask_leaves(tmp_path, quiet):
    from PIL import Image

    train(
        small({"train": {"steps": 2, "preview_every": 1}, "sample": {"steps": 2}}), tmp_path, quiet
    )
    names = sorted(p.name for p in (tmp_path / "previews").iterdir())
    kinds = ("masked", "samples")
    # Samples of a network without any training are noise.
    assert names == [f"img-{i * 8:09d}-{kind}.png" for i in range(3) for kind in kinds if i or
                     kind == "masked"]  # fmt: skip
    picture = Image.open(tmp_path / "previews" / names[-2])
    assert picture.height == 4 * (16 * 3 + 2) + 2
    assert picture.width > 8 * (16 * 3 + 2) + 2  # the rows' names beside it


def test_a_preview_costs_a_share_of_the_training_between_two(tmp_path):
    layers = {"sample": {"steps": 50}, "mask": {"ratio": 0.0}, "objective": {"name": "dsm"}}
    config = road.resolve(small(layers, {"train": {"batch_size": 8, "preview_every": 1000}}))
    counted = cost.measure(config)  # a step is 3 x 8 passes
    assert previews.plan(config, counted) == previews.Plan(40, 30)  # 50 steps are 1,200 passes
    assert previews.plan(config, counted, first=True) == previews.Plan(8, 15)  # 5 steps are 120
    config.train.batch_size = 128
    assert previews.plan(config, counted) == previews.Plan(40, 50)
    config.sample.cfg_scale = 2.0  # two passes of the network a step
    config.train.batch_size = 4
    assert previews.plan(config, counted) == previews.Plan(8, 37)


@pytest.mark.parametrize("classes", [0, 10])
def test_previews_do_without_guidance_that_training_cannot_give(classes):
    model = {"num_classes": classes, "hidden_size": 16, "num_heads": 2, "depth": 3}
    config = road.resolve(
        small({"model": model, "sample": {"steps": 2, "cfg_scale": 3.0, "guide": "runs/weaker"}})
    )
    plain = config.model_copy(
        update={"sample": config.sample.model_copy(update={"cfg_scale": 1.0, "guide": None})}
    )
    guided = config.model_copy(update={"sample": config.sample.model_copy(update={"guide": None})})
    torch.manual_seed(0)
    parts = road.build(config)
    for p in parts.backbone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pictures = [
        previews.samples(previews.model_in_training(parts.backbone, parts, each), 4).tobytes()
        for each in (plain, config, guided)
    ]
    assert pictures[0] == pictures[1]
    assert (pictures[1] == pictures[2]) == (classes == 0)


def test_metrics_hold_what_a_run_is_judged_by(tmp_path, quiet):
    train(small(), tmp_path, quiet)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [8 * i for i in range(1, 9)]
    assert {
        "loss",
        "grad_norm",
        "lr",
        "images_per_s",
        "data_wait",
        "peak_memory_bytes",
        "mask_ratio",
        "flops_per_s",
    } <= set(lines[0])
    assert lines[0]["mask_ratio"] == 0.75
    circumstances = json.loads((tmp_path / "run.json").read_text())
    assert circumstances["torch"] == torch.__version__


def test_tensorboard_gets_the_metrics(tmp_path, quiet):
    pytest.importorskip("tensorboard")
    train(small({"train": {"steps": 2, "trackers": ["tensorboard"]}}), tmp_path, quiet)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_missing_tracker_is_an_error_not_a_silence(tmp_path, quiet, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="names wandb, which is not installed"):
        train(small({"train": {"trackers": ["wandb"]}}), tmp_path, quiet)


def test_options_of_speed_train(tmp_path, quiet):
    summary = train(
        small({"train": {"gradient_checkpointing": True, "steps": 2}}), tmp_path / "a", quiet
    )
    train(small({"train": {"steps": 2}}), tmp_path / "b", quiet)
    assert summary.images_seen == 16
    a, b = (load_file(tmp_path / n / "weights.safetensors") for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        train(small({"train": {"precision": "fp16"}}), tmp_path / "c", quiet)


def test_torn_checkpoints_never_cost_a_whole_one(tmp_path, quiet):
    """Two torn newer ones, keep 1: the run goes on from the whole one and ends with its own."""
    train(small({"train": {"checkpoint_every": 2, "keep_checkpoints": 3}}), tmp_path, quiet)
    for name in ("img-000000048", "img-000000064"):
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "checkpoints" / ".img-000000072.part").mkdir()
    train(small({"train": {"steps": 5, "keep_checkpoints": 1}}), tmp_path, quiet)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["img-000000040"]
    assert sum("it was not whole" in note for note in quiet.notes) == 2
    (tmp_path / "checkpoints" / "img-000000040" / "DONE").unlink()
    with pytest.raises(MsmdiffError, match=r"no checkpoint under .* is whole"):
        train(small(), tmp_path, quiet)


def test_checkpoints_are_ordered_by_number(tmp_path):
    for images in (999_999_872, 1_000_000_000):
        folder = tmp_path / "checkpoints" / f"img-{images:09d}"
        folder.mkdir(parents=True)
        (folder / "DONE").write_text("{}")
    assert checkpoint.newest(tmp_path).name == "img-1000000000"


def test_a_kill_before_the_weights_are_published_is_mended(tmp_path, quiet):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    (tmp_path / "weights.safetensors").unlink()
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    assert (tmp_path / "weights.safetensors").is_file()


def test_other_data_under_the_same_run_are_refused(tmp_path, photos, quiet):
    layers = {"data": {"source": str(photos)}}
    train(small(layers, {"train": {"steps": 2}}), tmp_path / "run", quiet)
    (photos / "cat" / "1.png").rename(photos / "cat" / "1.txt")
    with pytest.raises(UsageError, match=r"was trained on 12 images, .* now has 11"):
        train(small(layers, {"train": {"steps": 4}}), tmp_path / "run", quiet)


def test_as_many_other_images_or_classes_are_refused(tmp_path, photos, quiet):
    layers = {"data": {"source": str(photos)}}
    train(small(layers, {"train": {"steps": 2}}), tmp_path / "run", quiet)
    (photos / "cat").rename(photos / "eel")
    with pytest.raises(
        UsageError, match=r"was trained on 12 images, .* now has 12, others or of other classes"
    ):
        train(small(layers, {"train": {"steps": 4}}), tmp_path / "run", quiet)
    (photos / "eel").rename(photos / "cat")
    train(small(layers, {"train": {"steps": 4}}), tmp_path / "run", quiet)


def test_what_a_kill_after_a_checkpoint_prevented_is_made_up_for(tmp_path, quiet, monkeypatch):
    every = {
        "train": {"steps": 4, "checkpoint_every": 2, "preview_every": 2},
        "sample": {"steps": 2},
    }
    every |= {"eval": {"every": 2, "n": 8, "features": "pixel"}}
    train(small(every), tmp_path / "straight", quiet)

    def killed(*_):
        raise RuntimeError("killed")

    for patched in ("_preview", "sampled"):  # before the pictures, then before the distance
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, patched, killed)
            with pytest.raises(RuntimeError, match="killed"):
                train(small(every, {"train": {"steps": 2}}), tmp_path / "killed", quiet)
    train(small(every), tmp_path / "killed", quiet)
    pictures, distances = [], []
    for run in ("straight", "killed"):
        pictures.append(sorted(path.name for path in (tmp_path / run / "previews").glob("img-*")))
        lines = Run(tmp_path / run, writes=False).metrics()
        distances.append(
            [(line["images"], line["fd_pixel"]) for line in lines if "fd_pixel" in line]
        )
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) >= 3
    assert [images for images, _ in distances[0]] == [16, 32]
    assert distances[0] == distances[1]


def test_a_signal_that_another_process_received_counts_as_an_interruption(
    tmp_path, quiet, monkeypatch
):
    # Pictures and distances of an earlier start, then two steps.
    stopped = iter([False, False, False, True])
    monkeypatch.setattr(Trainer, "_agree", lambda self, stop: next(stopped))
    summary = train(small(), tmp_path, quiet)
    assert (summary.interrupted, summary.steps) == (signal.SIGTERM, 1)
    assert checkpoint.newest(tmp_path) is not None


def test_a_schedule_ends_where_the_training_was_to_end(tmp_path, quiet):
    decaying = {"optim": {"schedule": "cosine"}}
    train(small(decaying), tmp_path, quiet)
    rates = [line["lr"] for line in Run(tmp_path, writes=False).metrics()]
    assert rates[0] == 1e-3
    assert rates[4] == pytest.approx(5e-4)
    assert rates[-1] < 1e-4
    # The run goes on by the schedule that it began.
    train(small(decaying, {"train": {"steps": 9}}), tmp_path, quiet)
    rates = [line["lr"] for line in Run(tmp_path, writes=False).metrics()]
    assert len(rates) == 9
    assert rates[-1] == 0
    assert any(
        "the rate reaches 0 at step 8 and stays there until step 9" in n for n in quiet.notes
    )
    with pytest.raises(UsageError, match=r"optim.decay_steps: 8 there, 12 now"):
        train(
            small(decaying, {"train": {"steps": 9}, "optim": {"decay_steps": 12}}), tmp_path, quiet
        )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"},
            "starts one process whatever --num_processes says",
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks, which would each work alone"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but no RANK, MASTER_ADDR, MASTER_PORT: unset it"),
    ],
)
def test_launches_that_would_not_work_together_are_refused(
    tmp_path, quiet, monkeypatch, environment, message
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        train(small(), tmp_path, quiet)


def test_data_and_weights_that_lie_elsewhere_now_are_the_same(tmp_path, photos, quiet):
    train(small({"train": {"steps": 1}}), tmp_path / "primer", quiet)
    primer = tmp_path / "primer" / "weights.safetensors"
    layer = {"data": {"source": str(photos)}, "train": {"steps": 2, "init_from": str(primer)}}
    train(small(layer), tmp_path / "run", quiet)
    moved = photos.rename(tmp_path / "moved")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(primer.read_bytes())
    layer = {"data": {"source": str(moved)}, "train": {"steps": 3, "init_from": str(copy)}}
    assert train(small(layer), tmp_path / "run", quiet).steps == 3
    primer.unlink()
    again = copy.rename(tmp_path / "again.safetensors")
    layer["train"] = {"steps": 4, "init_from": str(again)}
    assert train(small(layer), tmp_path / "run", quiet).steps == 4
    copy.write_bytes(b"another")
    layer["train"]["init_from"] = str(copy)
    with pytest.raises(UsageError, match=r"was started from the weights in .*which were others"):
        train(small(layer), tmp_path / "run", quiet)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_other_images_of_the_same_names_are_refused(tmp_path, photos, quiet, kind):
    source = photos
    if kind == "npz":
        source = tmp_path / "a.npz"
        np.savez(source, arr_0=np.arange(12 * 8 * 8 * 3, dtype=np.uint8).reshape(12, 8, 8, 3))
    data = {"source": str(source)}
    train(small({"data": data, "train": {"steps": 1}}), tmp_path / "run", quiet)
    data["source"] = str(source.rename(tmp_path / f"moved{source.suffix}"))
    layer = {"data": data, "train": {"steps": 2}}
    assert train(small(layer), tmp_path / "run", quiet).steps == 2
    if kind == "npz":
        np.savez(data["source"], arr_0=np.ones((12, 8, 8, 3), np.uint8))
    else:
        moved = tmp_path / "moved" / "cat"
        (moved / "1.png").write_bytes((moved / "3.png").read_bytes())
    with pytest.raises(UsageError, match=r"has 12, others or of other classes"):
        train(small(layer), tmp_path / "run", quiet)


def test_a_checkpoint_of_before_knows_its_data_by_their_place(tmp_path, photos, quiet, monkeypatch):
    layer = {"data": {"source": str(photos)}, "train": {"steps": 1}}
    with monkeypatch.context() as before:
        before.setattr(origins, "of", lambda config, source: {"listing": source.listing()})
        train(small(layer), tmp_path / "run", quiet)
    layer["train"]["steps"] = 2
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(photos, elsewhere)
    with pytest.raises(UsageError, match=r"has 12, others or of other classes"):
        train(small(layer, {"data": {"source": str(elsewhere)}}), tmp_path / "run", quiet)
    layer["data"]["source"] = f"{photos}/"
    assert train(small(layer), tmp_path / "run", quiet).steps == 2


@pytest.mark.parametrize("name", ["config.yaml", "weights.safetensors"])
def test_foreign_files_in_a_run_directory_are_not_replaced(tmp_path, quiet, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=rf"{name} was not written by a training: move it"):
        train(small(), tmp_path, quiet)
    assert (tmp_path / name).read_text() == "mine"


def test_a_wrong_number_of_threads_is_named(tmp_path, quiet, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "x")
    with pytest.raises(UsageError, match="OMP_NUM_THREADS=x: give a number of threads"):
        train(small(), tmp_path, quiet)


def test_a_torn_picture_is_drawn_again(tmp_path, quiet):
    every = {"train": {"steps": 2, "preview_every": 2}, "sample": {"steps": 2}}
    train(small(every), tmp_path, quiet)
    pictures = sorted((tmp_path / "previews").glob("img-000000016-*.png"))
    assert len(pictures) == 2
    whole = [path.read_bytes() for path in pictures]
    pictures[0].unlink()
    pictures[1].write_bytes(whole[1][:300])
    train(small(every), tmp_path, quiet)
    assert [path.read_bytes() for path in pictures] == whole


def test_settings_that_change_only_how_a_step_is_computed_may_change(tmp_path, quiet):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    other = {"train": {"steps": 4, "micro_batch_size": 4, "gradient_checkpointing": True}}
    other |= {"data": {"verify": "off"}}
    other["train"]["deterministic"] = True
    assert train(small(other), tmp_path, quiet).steps == 4
    told = [line for line in quiet.notes if "the same training, but not bit for bit" in line]
    assert [line.split()[0] for line in told] == [
        "train.micro_batch_size",
        "train.deterministic",
        "train.gradient_checkpointing",
    ]


def test_a_rate_may_change_knowingly_and_is_recorded(tmp_path, quiet):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    changed = {"optim": {"lr": 1e-4}, "data": {"skip_unreadable": True}}
    slower = small(changed, {"train": {"steps": 4}})
    with pytest.raises(UsageError, match=r"optim.lr: .* 0.0001 now.*--allow-change goes on"):
        train(slower, tmp_path, quiet)
    train(slower, tmp_path, quiet, allow_change=True)
    rates = [line["lr"] for line in Run(tmp_path, writes=False).metrics() if "lr" in line]
    assert rates[-2:] == [1e-4, 1e-4]
    assert rates[0] > 1e-4
    train(small(changed, {"train": {"steps": 5}}), tmp_path, quiet)
    left_out, change = json.loads((tmp_path / "run.json").read_text())["changes"]
    assert (left_out["key"], left_out["new"]) == ("data.skip_unreadable", True)
    assert (change["images"], change["key"], change["new"]) == (16, "optim.lr", 1e-4)
    wider = small({"model": {"depth": 7}, "train": {"steps": 5}}, changed)
    with pytest.raises(UsageError, match=r"--allow-change does not cover model\.depth"):
        train(wider, tmp_path, quiet, allow_change=True)


def test_a_time_that_is_over_before_the_first_step_still_gives_weights(tmp_path, quiet):
    short = small({"train": {"max_seconds": 1e-9}})
    assert train(short, tmp_path, quiet).steps == 1
    assert weights.load(tmp_path).config.model.depth == 3
    assert train(short, tmp_path, quiet).steps == 1  # its time is over now


def test_a_finished_run_says_so(tmp_path, quiet):
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    train(small({"train": {"steps": 2}}), tmp_path, quiet)
    assert any("is finished: it has taken all of its 2 steps" in line for line in quiet.notes)


def test_an_average_that_has_hardly_moved_is_told(tmp_path, quiet):
    done = train(small({"ema": {"decays": [0.999], "warmup": "constant"}}), tmp_path, quiet)
    assert "decay 0.999, which has gone 0.8% of the way from the first w" in done.remark


def test_an_average_that_is_slow_after_its_copies_is_told(tmp_path, quiet):
    slow = {"ema": {"decays": [0.999], "update_after_step": 1, "power": 5}}
    done = train(small(slow), tmp_path, quiet)
    assert "of the way from those after step 2 to the trained ones" in done.remark
    assert "a lower ema.power" in done.remark
    assert train(small(), tmp_path / "usual", quiet).remark == ""


@pytest.mark.parametrize("steps", [1, 4, 9, 30])
@pytest.mark.parametrize(
    "options",
    [
        {"warmup": "constant"},
        {"warmup": "constant", "update_every": 4},
        {"update_after_step": 5},
        {"update_after_step": 0, "power": 2.0},
        {"update_after_step": 5, "update_every": 3, "power": 3.0},
        {"update_after_step": 100},
    ],
)
def test_how_far_an_average_has_come_is_what_it_takes_in(options, steps):
    """A weight that is 0 until the last plain copy and 1 from then on."""
    net, config = torch.nn.Linear(1, 1, bias=False), section("ema", decays=[0.9], **options)
    copied, moved = progress(config, 0.9, steps)
    with torch.no_grad():
        net.weight.zero_()
        averages = Averages(net, config)
        for step in range(1, steps + 1):
            net.weight.fill_(float(step > copied))
            averages.update()
    average = averages.networks["0.9"].weight.item()
    assert moved == pytest.approx(average, abs=1e-5)


def test_a_kill_before_the_best_was_noted_is_made_up_for(tmp_path, quiet):
    layer = {"eval": {"every": 2, "n": 10, "features": "pixel"}, "sample": {"steps": 2}}
    train(small(layer, {"train": {"steps": 2}}), tmp_path, quiet)
    best, curve = tmp_path / "best.json", tmp_path / "previews" / "best.png"
    noted = best.read_text()
    best.unlink()
    curve.unlink()
    train(small(layer, {"train": {"steps": 2}}), tmp_path, quiet)
    assert best.read_text() == noted
    assert curve.is_file()


def test_nothing_half_written_stays_in_a_run(tmp_path, quiet):
    train(small({"train": {"steps": 1}}), tmp_path, quiet)
    (tmp_path / "previews" / ".a.png.part").write_bytes(b"torn")
    (tmp_path / ".weights.safetensors.part").write_bytes(b"torn")
    train(small({"train": {"steps": 1}}), tmp_path, quiet)
    assert not list(tmp_path.rglob("*.part"))


def test_a_signal_before_the_first_step_ends_at_once(tmp_path, quiet, monkeypatch):
    def told(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(cost, "measure", told)
    summary = train(small(), tmp_path, quiet)
    assert (summary.interrupted, summary.images_seen) == (signal.SIGTERM, 0)
    assert checkpoint.newest(tmp_path) is None
    Run(tmp_path).close()  # the run is not locked


def test_a_signal_does_not_wait_for_distances(tmp_path, quiet, monkeypatch):
    def told(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on measuring")

    monkeypatch.setattr(evaluation.Evaluator, "__call__", told)
    layer = {"eval": {"every": 2, "n": 10, "features": "pixel"}}
    summary = train(small(layer), tmp_path, quiet)
    assert (summary.interrupted, summary.steps) == (signal.SIGTERM, 2)
    assert checkpoint.newest(tmp_path).name == "img-000000016"


def test_a_signal_does_not_wait_for_pictures(tmp_path, quiet, monkeypatch):
    def told(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on drawing")

    monkeypatch.setattr(previews, "draw", told)
    summary = train(small({"train": {"steps": 2, "preview_every": 2}}), tmp_path, quiet)
    assert (summary.interrupted, summary.images_seen) == (signal.SIGTERM, 0)
