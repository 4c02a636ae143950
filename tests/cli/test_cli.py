"""The command line as a user runs it: real processes, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msmdiff.cli.quickstart import _remove_results, quickstart
from msmdiff.core.errors import UsageError

COMMANDS = [
    [],
    ["pretrain"],
    ["finetune"],
    ["train"],
    ["sample"],
    ["fid"],
    ["weights"],
    ["weights", "show"],
    ["quickstart"],
]
TINY = [
    "--batch-size",
    "8",
    "--set",
    "model.hidden_size=16",
    "--set",
    "model.num_heads=2",
    "--set",
    "model.depth=3",
]
TINY += ["--set", "train.preview_every=0"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_examples_and_imports_nothing_heavy(cli, command):
    shown = cli(*command, "--help", PYTHONPROFILEIMPORTTIME="1")
    assert "Usage: " in shown.stdout
    if command and command != ["weights"]:
        assert "Examples: " in shown.stdout
    imported = {
        line.rpartition("|")[2].strip()
        for line in shown.stderr.splitlines()
        if line.startswith("import time")
    }
    assert "typer" in imported
    assert not imported & {"torch", "numpy", "accelerate", "PIL", "sklearn"}


def test_the_whole_road(cli, tmp_path):
    """pretrain -> finetune -> sample -> fid, by the bare forms."""
    cli("pretrain", "--mask", "0.9", "--steps", "6", "--run", "primer", *TINY)
    primer = tmp_path / "runs" / "primer"
    assert "ratio: 0.9" in (primer / "config.yaml").read_text()

    done = cli(
        "finetune", "--ckpt", "primer", "--conditional", "--steps", "5", "--run", "tuned", "--json"
    )
    assert "loaded" in done.stderr
    assert "missing 1: label_emb.weight" in done.stderr
    summary = json.loads(done.stdout)
    assert summary["images_seen"] == 40
    assert summary["config"]["mask"]["ratio"] == 0
    assert summary["config"]["objective"]["name"] == "dsm"
    assert summary["config"]["model"]["num_classes"] == 10
    assert summary["config"]["model"]["hidden_size"] == 16

    cli("sample", "--n", "12", "--steps", "3")  # the newest run
    cli("sample", "primer", "--seeds", "5-14", "--steps", "3", "--batch-size", "4")
    assert len(list((tmp_path / "samples" / "tuned").glob("*.png"))) == 12
    assert (
        sorted(p.name for p in (tmp_path / "samples" / "primer").glob("*.png"))[0] == "000005.png"
    )
    assert (tmp_path / "samples" / "tuned.grid.png").is_file()

    done = cli(
        "fid", "samples/tuned", "samples/primer", "--features", "pixel", "--json", "score.json"
    )
    assert "pixel Fréchet distance" in done.stdout
    assert "FID" not in done.stdout
    score = json.loads((tmp_path / "score.json").read_text())
    assert (score["count_a"], score["count_b"], score["features"]) == (12, 10, "pixel-8x8")
    assert score["value"] > 0

    shown = cli("weights", "show", "tuned").stdout
    for part in ("uvit", "40 images (ema-0.995), dsm", "predicts x0", "digits"):
        assert part in shown


def test_the_same_command_resumes_and_more_steps_go_on(cli, tmp_path):
    command = ["train", "--steps", "4", *TINY]
    cli(*command)
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("train-digits-tiny-")
    first = (run / "weights.safetensors").read_bytes()
    done = cli(*command)
    assert "resuming" in done.stdout
    assert (run / "weights.safetensors").read_bytes() == first
    cli("train", "--steps", "6", *TINY)
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert (run / "weights.safetensors").read_bytes() != first


def test_npz_is_adms_and_a_seed_is_an_image(cli, tmp_path):
    cli("train", "--steps", "2", "--run", "r", *TINY)
    cli(
        "sample",
        "r",
        "--seeds",
        "0-9",
        "--classes",
        "3,5",
        "--steps",
        "4",
        "--npz",
        "a.npz",
        "--no-grid",
        "--batch-size",
        "3",
    )
    cli("sample", "r", "--seeds", "7", "--classes", "3,5", "--steps", "4", "--out", "one")
    content = np.load(tmp_path / "a.npz")
    assert content["arr_0"].shape == (10, 16, 16, 3)
    assert content["arr_0"].dtype == np.uint8
    assert content["arr_1"].tolist() == [3, 5] * 5
    alone = np.asarray(Image.open(tmp_path / "one" / "000007.png")).astype(int)
    assert np.abs(alone - content["arr_0"][7]).max() <= 1
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "samples" / "r" / "000007.png")), content["arr_0"][7]
    )
    done = cli("sample", "r", "--steps", "5", code=2)
    assert "samples/r holds images sampled with other settings" in done.stderr
    assert "sample.steps: 4 there, 5 now; classes: '3,5' there, None now" in done.stderr
    assert json.loads((tmp_path / "samples" / "r" / "sample.json").read_text())["seeds"] == "0-9"
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "mine" / "000000.png")
    done = cli("sample", "r", "--n", "1", "--steps", "2", "--out", "mine", code=2)
    assert "mine holds images that were not sampled here" in done.stderr


def test_dry_run_shows_the_plan_and_trains_nothing(cli, tmp_path):
    shown = cli(
        "pretrain", "--model", "MaskDM-S/4", "--image-size", "64", "--mask", "0.9", "--dry-run"
    ).stdout
    assert "# parameters      44,292,144" in shown
    assert "26 of 256 seen, 89.84% hidden" in shown
    assert "GFLOP with the mask" in shown
    assert not (tmp_path / "runs").exists()


def test_bench_names_what_scripts_rely_on(cli):
    command = [
        "bench",
        "--batch-size",
        "4",
        "--steps",
        "2",
        "--mask",
        "0.5",
        "--mask",
        "0.9",
        "--json",
    ]
    report = json.loads(cli(*command).stdout)
    assert [row["kept"] for row in report["results"]] == [64, 32, 6]
    for row in report["results"]:
        assert row["images_per_s"] == pytest.approx(4000 / row["ms_per_step"])
        assert row["flops_per_s"] > 0
        assert 0 < row["peak_fraction"] < 1
        assert row["peak_memory_bytes"] > 2**20
    assert "6 of 64" in cli("bench", "--batch-size", "4", "--steps", "1").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pretrain", "--mask", "1.5"], 2, "mask.ratio = 1.5: input should be less than 1"),
        (["pretrain", "--model", "tiy"], 2, "'tiy' is not a known size; did you mean 'tiny'"),
        (["pretrain", "--set", "train.stepz=3"], 2, "'train.stepz'; did you mean 'steps'"),
        (["pretrain", "--config", "digit-pretrain"], 2, "did you mean 'digits-pretrain'"),
        (["train", "--mask-kind", "block"], 2, "--mask-kind block has no effect without a mask"),
        (["pretrain", "--data", "nowhere"], 2, "data source 'nowhere' does not exist"),
        (["pretrain", "--image-size", "17"], 2, "the nearest valid values are 16 and 18"),
        (["pretrain", "--steps", "3", "--images", "9"], 2, "give one"),
        (["pretrain", "--mask-kind", "hole"], 2, "hole"),
        (["pretrain", "--bogus"], 2, "--bogus"),
        (["finetune"], 2, "--ckpt"),
        (["finetune", "--ckpt", "nothing"], 2, "'nothing' is neither a weights file nor a run"),
        (["sample"], 2, "no run with weights under runs/"),
        (["sample", "--n", "3", "--seeds", "0-2"], 2, "give one"),
        (["sample", "--seeds", "9-1"], 2, "--seeds 9-1"),
        (["fid", "photos"], 2, "fid compares two sets"),
        (["fid", "photos", "nowhere"], 2, "'nowhere' does not exist"),
        (["fid", "photos/cat/1.png", "photos"], 2, "a file of no known kind"),
        (
            ["weights", "show", "broken.safetensors"],
            1,
            "broken.safetensors is not a safetensors file that can be read",
        ),
    ],
)
def test_mistakes_get_one_sentence(cli, tmp_path, photos, arguments, code, message):
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 100)
    if arguments[0] == "fid":
        arguments = [*arguments, "--features", "pixel"]
    done = cli(*arguments, code=code)
    assert message in " ".join(done.stderr.replace("│", " ").split())
    if "Usage:" not in done.stderr:
        assert done.stderr.count("\n") == 1


def test_a_conditional_model_needs_labels(cli, tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "flat" / f"{i}.png")
    done = cli("train", "--data", "flat", "--set", "model.num_classes=3", code=2)
    assert "flat has no labels: put images into one sub-folder per class" in done.stderr
    done = cli("train", "--data", "flat", "--conditional", code=2)
    assert "model.num_classes is auto, but flat has no labels" in done.stderr
    cli("train", "--data", "flat", "--steps", "2", *TINY)


@contextmanager
def training(folder, *options):
    """A training with two loader workers in a session of its own, once it has logged a line."""
    arguments = ["train", "--data", "photos", "--steps", "100000", "--run", "r", *TINY, *options]
    arguments += ["--set", "data.workers=2", "--set", "train.log_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "msmdiff", *arguments],
        cwd=folder,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "runs" / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        yield process
    finally:
        process.kill()


def test_ctrl_c_with_loader_workers_saves(tmp_path, photos):
    """A terminal's Ctrl-C reaches the workers too."""
    with training(tmp_path) as process:
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    assert (tmp_path / "runs" / "r" / "weights.safetensors").is_file()


def test_a_loader_worker_that_the_system_ends_is_a_sentence(tmp_path, photos):
    with training(tmp_path) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1, errors
    assert errors.startswith("error: a loader process was ended from outside")
    assert errors.count("\n") == 1


def test_a_summary_that_runs_over_two_lines_is_listed_whole(cli):
    rows = {
        row["name"]: row["what it is"] for row in json.loads(cli("list", "routes", "--json").stdout)
    }
    assert rows["side"].endswith("in the gaps, all through the decoder.")
    assert rows["visible"].endswith("to the output (masked score matching).")


def test_two_processes_share_the_work(cli):
    """torchrun on gloo: one writer, both stop at the same step, and a second start resumes."""

    def launch(steps):
        run = ["--steps", str(steps), "--run", "two", "--json", *TINY]
        return cli("train", *run, processes=2)

    first = launch(3)
    assert json.loads(first.stdout)["images_seen"] == 24
    assert "cpu x 2" in first.stderr
    second = launch(5)
    assert json.loads(second.stdout)["images_seen"] == 40
    assert "resuming" in second.stderr


def test_training_on_photos_in_wavelet_space(cli, tmp_path, photos):
    done = cli(
        "pretrain",
        "--data",
        "photos",
        "--codec",
        "dwt",
        "--image-size",
        "32",
        "--mask-kind",
        "block",
        "--mask-block",
        "2",
        "--mask",
        "0.7",
        "--steps",
        "2",
        "--run",
        "w",
        *TINY,
    )
    assert "measured codec.std" in done.stdout
    config = (tmp_path / "runs" / "w" / "config.yaml").read_text()
    assert "std:\n  - " in config
    cli(
        "finetune",
        "--ckpt",
        "w",
        "--set",
        "codec.level=2",
        "--steps",
        "2",
        "--run",
        "w2",
        "--allow-partial",
    )
    cli("sample", "w2", "--n", "2", "--steps", "2")
    assert Image.open(tmp_path / "samples" / "w2" / "000001.png").size == (32, 32)


def test_quickstart_tells_the_whole_story(cli, tmp_path):
    (tmp_path / "demo" / "seed1_photos").mkdir(parents=True)
    (tmp_path / "demo" / "thesis.txt").write_text("mine")
    done = cli("quickstart", "--minutes", "0.5", "--out", "demo", "--fresh")
    for part in (
        "masked + fine-tuned",
        "from scratch",
        "real training digits",
        "Pixel Fréchet distance",
        "a masked step is",
    ):
        assert part in done.stdout
    for name in ("samples", "scratch", "masked", "curves"):
        assert Image.open(tmp_path / "demo" / f"{name}.png").width > 200
    story = json.loads((tmp_path / "demo" / "quickstart.json").read_text())
    floor = story["real_train_to_held_out"]
    assert floor == pytest.approx(1.21, abs=0.01)
    assert set(story["arms"]) == {"scratch", "masked"}
    for arm in story["arms"].values():
        assert min(arm["values"]) > floor
    _remove_results(tmp_path / "demo")
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["seed1_photos", "thesis.txt"]
    (tmp_path / "demo" / "quickstart.json").write_text("{}")
    done = cli("quickstart", "--out", "demo", code=2)
    assert "holds a finished quickstart" in done.stderr


def test_fresh_removes_what_a_quickstart_wrote_and_nothing_else(tmp_path):
    kept = ("seed1_photos/a.jpg", "masked/seed-0/mine.txt", "scratch/seed-1/stage-1/mine.txt")
    written = ("masked/seed-0/stage-1/run.json", "scratch/seed-2/stage-1/run.json", "plan.json")
    for name in (*kept, *written):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    _remove_results(tmp_path)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == sorted(kept)
    assert not (tmp_path / "scratch" / "seed-2").exists()
    (tmp_path / "curves.png").write_text("mine")  # where no quickstart began
    _remove_results(tmp_path)
    assert (tmp_path / "curves.png").read_text() == "mine"
    with pytest.raises(UsageError, match=r"curves.png is there already, and was not written"):
        quickstart(out=tmp_path)


def test_training_starts_where_git_is_not_installed(cli, tmp_path):
    (tmp_path / "bin").mkdir()
    cli("train", "--steps", "1", "--batch-size", "4", "--run", "r", PATH=str(tmp_path / "bin"))
    assert json.loads((tmp_path / "runs/r/run.json").read_text())["git"] is None
