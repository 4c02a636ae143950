"""Flags become a configuration; a run goes on with its own."""

import inspect
from pathlib import Path

import pytest

from msmdiff.cli import answers, completion, flags, plan, training
from msmdiff.core import config as configuration
from msmdiff.core.errors import UsageError
from msmdiff.core.training import preparing
from msmdiff.core.training.run import Run
from msmdiff.core.training.trainer import train

NAMES = list(inspect.signature(flags._training_options).parameters)
SMALL = {
    "model": {"hidden_size": 16, "num_heads": 2, "depth": 3},
    "data": {"source": "digits:train"},
    "train": {"steps": 2, "batch_size": 8, "preview_every": 0},
    "mask": {"ratio": 0.75},
    "objective": {"name": "msm"},
}


def asked(**given):
    told = []
    options = dict.fromkeys(NAMES) | {"chooses": False, "tell": told.append} | given
    return options, told


def test_flags_become_keys_and_what_is_given_wins(photos):
    options, told = asked(
        data=str(photos), chooses=True, lr=3e-4, epochs=5, sets=["train.batch_size=6"]
    )
    config = flags.configure(options)
    assert config.optim.lr == 3e-4
    assert config.train.steps == 10  # five times twelve images, six at once
    assert (config.data.image_size, config.process.prediction) == (24, "x0")
    assert told[0].startswith("chosen for 12 images of about 24 px on a CPU")
    with pytest.raises(UsageError, match="--epochs 5 and --steps 3 say the same thing"):
        flags.configure(asked(data=str(photos), epochs=5, steps=3)[0])


def test_a_plan_chooses_settings_for_data_that_are_not_here():
    options, told = asked(data="away/", chooses=True, dry_run=True, batch_size=40)
    assert flags.configure(options).train.steps == 3000  # sixty times 2,000 images, 40 at once
    assert told[0] == "away/ is not here: 2,000 images are taken for granted"
    with pytest.raises(UsageError, match="away/' does not exist"):
        flags.configure(asked(data="away/", chooses=True)[0])


def test_a_run_goes_on_with_its_own_settings(tmp_path, quiet):
    train(configuration.build(SMALL), tmp_path / "r", quiet)
    options, _ = asked(run=str(tmp_path / "r"))
    goes_on = flags.begun(options)
    config = flags.configure(options, goes_on=goes_on)
    assert config.mask.ratio == 0.75
    assert train(config, tmp_path / "r", quiet).steps == 2
    options["steps"] = 3
    longer = flags.configure(options, goes_on=goes_on)
    assert train(longer, tmp_path / "r", quiet).steps == 3
    options["mask"] = 0.5
    other = flags.configure(options, goes_on=goes_on)
    with pytest.raises(UsageError, match=r"mask\.ratio: 0\.75 there, 0\.5 now"):
        train(other, tmp_path / "r", quiet)


@pytest.mark.parametrize(
    ("run", "directory"),
    [("a", "runs/a"), ("a/b", "a/b"), ("./a", "a"), (".", "."), ("..", ".."), ("/a", "/a")],
)
def test_a_run_is_a_path_or_a_name(run, directory):
    assert flags.place(run) == Path(directory)


def test_a_run_to_resume_has_to_be_there(tmp_path):
    with pytest.raises(UsageError, match=r"--resume .*there is no checkpoint in"):
        flags.begun(asked(resume=str(tmp_path / "none"))[0])
    with pytest.raises(UsageError, match="--run a and --resume b name two runs"):
        flags.begun(asked(run="a", resume="b")[0])
    assert flags.begun(asked(run=str(tmp_path / "new"))[0]) is None


def test_an_unknown_flag_that_is_a_key():
    assert answers._keys("--weight-decay") == ["optim.weight_decay"]
    assert answers._keys("--optim.lr") == ["optim.lr"]
    assert answers._keys("--eta") == ["sample.eta"]
    assert answers._keys("--num-heads") == ["model.num_heads"]
    assert answers._keys("--nonsense") == []


def test_a_plan_without_the_data_and_without_a_mask(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "TIMED_UP_TO", 0.0)  # by operations alone
    layers = {"data": {"source": str(tmp_path / "away")}, "model": {"num_classes": "auto"}}
    plan.show(configuration.build(SMALL, layers, {"mask": {"ratio": 0.0}, "objective": {
        "name": "dsm"}}), as_json=False)  # fmt: skip
    told = {line[2:18].strip(): line[18:] for line in capsys.readouterr().out.splitlines() if
            line.startswith("# ")}  # fmt: skip
    assert told["data"] == f"{tmp_path / 'away'} is not here; 10 classes are taken for granted"
    assert told["tokens"] == "64"
    assert "mask" not in told["per step"]
    assert "of this machine's speed of matrix products" in told["time"]
    assert "GiB of CPU memory in fp32" in told["memory"]
    plan.show(configuration.build(SMALL), as_json=False)
    assert "16 of 64 seen, 75.00% hidden" in capsys.readouterr().out


def test_a_shell_completes_what_there_is(tmp_path, monkeypatch):
    assert "digits-pretrain" in completion.presets("digits-p")
    assert completion.registered("size")("U-ViT-XX") == [f"U-ViT-XXS/{p}" for p in (1, 2, 4, 8, 16)]
    monkeypatch.chdir(tmp_path)
    for name in ("one", "other", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    assert sorted(completion.runs("o")) == ["one", "other"]
    assert completion.runs("runs/t") == ["runs/two"]


def test_a_default_name_is_that_of_the_same_training_only(tmp_path, monkeypatch):
    """The digest of a run of before, whose configuration had fewer keys, is another one."""
    monkeypatch.chdir(tmp_path)

    def name(*layers):
        return training._default_name("train", configuration.build(SMALL, *layers))

    def begun_with(**layer):
        run = Run(tmp_path / "runs" / "train-digits-train-tiny-000000")
        run.start(preparing.resolved(configuration.build(SMALL, layer), None, 0), "", 0)
        run.close()

    begun_with()
    assert name() == "train-digits-train-tiny-000000"
    assert name({"train": {"steps": 90}}) == "train-digits-train-tiny-000000"
    assert name({"optim": {"lr": 1e-5}}) != "train-digits-train-tiny-000000"
    assert name({"optim": {"clip_grad_norm": None}}) != "train-digits-train-tiny-000000"
    begun_with(data={"classes": ["1", "2"]})
    assert name() != "train-digits-train-tiny-000000"
    automatic = preparing.resolved(configuration.build(SMALL), None, 0).train.precision
    begun_with(train={"precision": "bf16" if automatic == "fp32" else "fp32"})
    assert name() != "train-digits-train-tiny-000000"
