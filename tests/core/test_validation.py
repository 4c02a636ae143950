"""The held-out loss: of fixed images at fixed noise, comparable between processes."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.config import section
from msmdiff.core.data import sources
from msmdiff.core.diffusion import process as processes
from msmdiff.core.errors import UsageError
from msmdiff.core.training import checkpoint, validation
from msmdiff.core.training.run import Run
from msmdiff.core.training.trainer import train

PROCESSES = [
    {"prediction": "eps"},
    {"prediction": "x0", "schedule": "linear"},
    {"prediction": "v", "schedule": "vp_cosine"},
    {"prediction": "velocity", "schedule": "flow"},
    {"prediction": "velocity_to_image", "schedule": "flow"},
    {"prediction": "edm", "schedule": "edm"},
    {"prediction": "edm", "schedule": "scaled_linear"},
]
SMALL = {
    "model": {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3},
    "train": {
        "batch_size": 8,
        "steps": 6,
        "log_every": 2,
        "preview_every": 0,
        "checkpoint_every": 3,
    },
    "data": {"source": "digits:train"},
    "eval": {"heldout_n": 40},
}


def small(*layers):
    return configuration.build(SMALL, *layers)


def losses(run):
    """(images, val_loss and its bins) of every line that has them."""
    lines = Run(run, writes=False).metrics()
    return [
        (line["images"], {k: v for k, v in line.items() if k.startswith("val")})
        for line in lines
        if "val_loss" in line
    ]


@pytest.mark.parametrize("fields", PROCESSES, ids=lambda f: "-".join(f.values()))
def test_one_estimate_has_one_loss_whatever_the_process(fields):
    """x0 + 0.1 in place of x0 is an error of SNR 0.01 in eps, in every schedule and prediction."""
    process = processes.build(section("process", **fields))
    assert validation.bins(process.schedule) == [0, 1, 2, 3, 4, 5]
    images = range(2, 7)
    x0 = torch.linspace(-1, 1, 5 * 3 * 16).reshape(5, 3, 4, 4)
    for number in range(6):
        t = validation.times(process.schedule, number, 10)[2:7]
        x_t = process.add_noise(x0, t, validation.noise_of(number, images, (3, 4, 4)))
        wrong = x0 + 0.1

        def network(x, time, condition, t=t, x_t=x_t, wrong=wrong):
            return process.target(wrong, process.eps_from_x0(wrong, x_t, t), t)

        got = validation.errors(network, process, x0, None, number, images, 10)
        log_snr = validation.EDGES[number] + 2 * (torch.arange(2, 7) + 0.5) / 10
        torch.testing.assert_close(got, 0.01 * log_snr.exp(), rtol=2e-3, atol=1e-7)


def test_noise_of_an_image_does_not_depend_on_its_batch():
    whole = validation.noise_of(1, range(6), (2, 3))
    assert torch.equal(whole[4:], validation.noise_of(1, range(4, 6), (2, 3)))
    assert not torch.equal(whole, validation.noise_of(2, range(6), (2, 3)))


def test_a_bin_that_the_schedule_does_not_reach_is_left_out():
    process = processes.build(section("process", schedule="edm", prediction="edm", sigma_max=5.0))
    assert validation.bins(process.schedule) == [1, 2, 3, 4, 5]


def test_training_logs_it_with_checkpoints_and_leaves_every_other_number_alone(tmp_path, quiet):
    masked = {"mask": {"ratio": 0.75}, "model": {"num_classes": 10}}
    train(small(masked), tmp_path / "with", quiet)
    train(small(masked, {"eval": {"heldout_every": 0}}), tmp_path / "without", quiet)
    with_, without = (
        checkpoint.load(checkpoint.newest(tmp_path / name))[1] for name in ("with", "without")
    )
    for name, tensors in with_.items():
        assert all(torch.equal(v, without[name][k]) for k, v in tensors.items())
    found = losses(tmp_path / "with")
    assert [images for images, _ in found] == [24, 48]
    assert losses(tmp_path / "without") == []
    last = found[-1][1]
    assert last["val_of"] == "digits:test, 40 images"
    own = [last[f"val_loss_{number}"] for number in range(6)]
    assert last["val_loss"] == pytest.approx(sum(own) / 6)
    # A network that starts with zeros says eps = 0, whose error is the noise's variance of 1.
    assert own == pytest.approx([1.0] * 6, abs=0.15)
    assert Image.open(tmp_path / "with" / "results.png").size[0] > 300


def test_it_is_of_the_first_average_without_a_mask(tmp_path, quiet):
    config = small({"mask": {"ratio": 0.75}, "ema": {"decays": [0.5, 0.9], "warmup": "constant"}})
    train(config, tmp_path / "r", quiet)
    resolved = Run(tmp_path / "r", writes=False).stored_config()
    assert resolved is not None
    parts = road.build(resolved)
    tensors = checkpoint.load(checkpoint.newest(tmp_path / "r"))[1]
    values = []
    for stem in ("ema-0.5", "ema-0.9"):
        parts.backbone.load_state_dict(tensors[stem])
        source = sources.open_source("digits:train")
        again = validation.Validation.of(resolved, parts, source, torch.device("cpu"), print)
        assert again is not None
        values.append(again(parts.backbone)["val_loss"])
    assert losses(tmp_path / "r")[-1][1]["val_loss"] == pytest.approx(values[0], rel=1e-6)
    assert values[0] != pytest.approx(values[1], rel=1e-6)


def test_a_resumed_run_has_the_same_losses(tmp_path, quiet):
    train(small(), tmp_path / "straight", quiet)
    train(small({"train": {"steps": 3}}), tmp_path / "resumed", quiet)
    train(small(), tmp_path / "resumed", quiet)
    assert losses(tmp_path / "straight") == losses(tmp_path / "resumed")


@pytest.mark.parametrize("codec", ["dwt", "pixel"])
def test_folders_count_by_the_names_of_their_classes(tmp_path, photos, quiet, codec):
    held = tmp_path / "held"
    (photos / "ant").mkdir()
    Image.new("RGB", (16, 16)).save(photos / "ant" / "a.png")
    for name, count in (("cat", 1), ("dog", 2)):
        (held / name).mkdir(parents=True)
        for path in sorted((photos / name).iterdir())[:count]:
            Image.open(path).rotate(180).save(held / name / path.name)
    layer = {
        "data": {"source": str(photos), "image_size": 16},
        "codec": {"name": codec},
        "model": {"num_classes": "auto"},
        "eval": {"heldout": str(held)},
    }
    train(small(layer), tmp_path / "r", quiet)
    assert losses(tmp_path / "r")[-1][1]["val_of"] == f"{held}, 3 images"
    config = Run(tmp_path / "r", writes=False).stored_config()
    assert config is not None
    found = validation.open_images(
        config, road.build(config).objective.condition, sources.open_source(str(photos)), print
    )
    assert found is not None
    assert found.y is not None
    assert sorted(found.y.tolist()) == [1, 2, 2]  # 0 is ant, of which nothing is held out


def test_without_images_to_hold_out_a_note_says_how_to_get_them(tmp_path, quiet):
    train(small({"data": {"source": "digits"}, "train": {"steps": 1}}), tmp_path / "r", quiet)
    assert losses(tmp_path / "r") == []
    assert [note for note in quiet.notes if "eval.heldout names images" in note] != []


@pytest.mark.parametrize("name", ["digits:train", "digits"])
def test_images_that_are_trained_on_are_refused(tmp_path, quiet, name):
    with pytest.raises(UsageError, match=f"eval.heldout {name}: the training on digits:train"):
        train(small({"eval": {"heldout": name}}), tmp_path / "r", quiet)


def test_classes_that_the_training_has_not_are_refused(tmp_path, photos, quiet):
    held = tmp_path / "held"
    for name in ("dog", "emu"):
        (held / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(held / name / "a.png")
    layer = {
        "data": {"source": str(photos)},
        "model": {"num_classes": 2},
        "eval": {"heldout": str(held)},
    }
    with pytest.raises(UsageError, match="has the class emu"):
        train(small(layer), tmp_path / "r", quiet)
    (held / "plain.png").write_bytes(Path(held / "dog" / "a.png").read_bytes())
    with pytest.raises(UsageError, match="has no classes"):
        train(small(layer), tmp_path / "r2", quiet)


def test_other_images_are_opened_as_the_trainings_own(photos):
    options = {"classes": ["cat"], "background": "black", "share": 0.5, "crop": "random"}
    data = {"source": f"{photos}:train", "kind": "files", **options}
    config = configuration.build({"data": data})
    half = validation.opened_alike(config, f"{photos}:test")
    assert (half.classes, half.background, half.kind) == (["cat"], "black", "files")
    assert (half.share, half.crop) == (1.0, "center")
    assert validation.opened_alike(config, "digits:test").kind == "auto"
