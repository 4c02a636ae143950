"""Two sharded processes compute what one whole does, and their checkpoints are the ones of a whole
training.

Accelerate shards on GPUs only. Here its state is told that the two gloo processes had GPUs; all
else is its own FSDP 2.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from msmdiff.core import config as configuration
from msmdiff.core.errors import UsageError
from msmdiff.core.training import checkpoint, sharding
from msmdiff.core.training.step import Step
from msmdiff.core.training.trainer import Trainer

UVIT = {
    "model": {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3},
    "mask": {"ratio": 0.75},
}
MDT = {
    "model": {
        "name": None,
        "family": "mdtv2",
        "patch_size": 2,
        "hidden_size": 16,
        "depth": 4,
        "num_heads": 2,
    }
    | {"decode_layers": 2, "learn_sigma": True, "num_classes": "auto"},
    "process": {
        "schedule": "linear",
        "weighting": "min_snr",
        "time_sampling": "loss_second_moment",
    },
    "train": {"gradient_checkpointing": True},
    "ema": {"decays": [0.9, 0.99], "warmup": "constant"},
}
# Without a mask the side block gets no gradients, neither whole nor in shards.
UNMASKED = {**MDT, "objective": {"name": "dsm"}, "optim": {"name": "adan"}}
MEANFLOW = {
    "model": {**UVIT["model"], "patch_size": 4, "num_classes": "auto"},
    "process": {
        "schedule": "flow",
        "prediction": "average_velocity",
        "time_sampling": "logit_normal",
    },
    "objective": {"name": "meanflow", "guidance_kappa": 0.5, "equal_times": 0.25},
    "sample": {"sampler": "meanflow", "steps": 2},
}
BLOCKS = {
    "model": {
        "name": None,
        "family": "dit",
        "patch_size": 2,
        "hidden_size": 16,
        "depth": 3,
        "num_heads": 2,
        "num_classes": "auto",
    }
    | {"norm": "rms", "qk_norm": True, "mlp": "swiglu", "rope": True, "value_residual": True}
    | {"class_tokens": 2, "bottleneck": 6},
    "mask": {"ratio": 0.75},
}
CASES = {
    "uvit": {**UVIT, "ema": {"snapshots_every": 2}},
    "uvit-bf16": {**UVIT, "train": {"precision": "bf16"}},
    "mdtv2": {**MDT, "eval": {"every": 3, "n": 7, "features": "pixel"}},
    "mdtv2-unmasked": UNMASKED,
    "meanflow": MEANFLOW,
    "muon": {**UVIT, "optim": {"name": "muon"}},
    "blocks": BLOCKS,
}
RESUMED = ["uvit", "mdtv2-unmasked"]
# Muon iterates in bf16, and makes small directions of a gradient as large as all others.
CLOSE = {"muon": 3e-4}
COMMON = {
    "train": {
        "batch_size": 8,
        "micro_batch_size": 2,
        "preview_every": 5,
        "checkpoint_every": 3,
        "precision": "fp32",
    }
    | {"keep_checkpoints": 9, "log_every": 1},
    "optim": {"lr": 1e-3, "clip_grad_norm": 0.1, "warmup_steps": 0},
    "sample": {"steps": 4},
}
STEPS = 5


class Silent:
    def note(self, text):
        pass

    def progress(self, *_):
        pass

    def activity(self, *_):
        pass


def train(name, folder, steps=STEPS, sharded=True, **settings):
    """The trainer after its steps, closed."""
    config = configuration.build(COMMON, CASES[name], {"train": {"steps": steps, **settings}})
    if sharded:
        PartialState(cpu=True)
        if PartialState._shared_state["distributed_type"] != DistributedType.FSDP:  # the first
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(config, Path(folder), Silent(), False, "")
    networks = [trainer.step.model, *trainer.step.averages.copies()]
    trained = [p for network in networks for p in network.parameters()]
    assert all(isinstance(p, DTensor) == sharded for p in trained)
    if sharded:
        blocks = [m for m in trainer.step.model.modules() if type(m).__name__ == "FSDPBlock"]
        assert len(blocks) == (5 if name.startswith("mdt") else 3)
        assert all(p.to_local().numel() < p.numel() for p in trained if p.shape[0] > 1)
    trainer.fit()
    trainer.close()
    return trainer


def train_sharded(folder):
    """Every case, put together by hand at the end; some resumed; and one with a gradient that is
    not finite.
    """
    for name in CASES:
        trainer = train(name, folder / name)
        networks = {"model": trainer.step.model} | {
            f"ema-{d}": net for d, net in trainer.step.averages.networks.items()
        }
        networks |= {f"width-{w}": net for w, net in trainer.step.averages.of_snapshots.items()}
        gathered = {
            k: {n: p.full_tensor() for n, p in net.named_parameters()}
            for k, net in networks.items()
        }
        if trainer.main:
            torch.save(gathered, folder / f"{name}.pt")
    for name in RESUMED:
        train(name, folder / f"{name}-resumed", 3)
        train(name, folder / f"{name}-resumed")
        train(name, folder / f"{name}-begun-whole")
    accumulate = Step._backward

    def poison(step, batch):
        terms = accumulate(step, batch)
        shards = [p.grad.to_local() for p in step.model.parameters() if p.grad is not None]
        if 8 <= batch.position < 16 and shards and os.environ["RANK"] == "1":
            max(shards, key=len)[-1] = float("inf")
        return terms

    with mock.patch.object(Step, "_backward", poison):
        assert train("uvit", folder / "poisoned", on_nonfinite="skip").step.skipped == 1


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def posthoc_files(run):
    return sorted((run / "snapshots").glob("*.safetensors"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder of runs that two processes left.

    In about one run of forty, gathering shards through gloo crashes inside torch (`wait_tensor` of
    its functional collectives), which no sharded training meets: it has GPUs, and NCCL. That, and
    no other failure, is tried again.
    """
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for _ in range(3):
        folder = tmp_path_factory.mktemp("sharded")
        for name in RESUMED:
            train(name, folder / f"{name}-begun-whole", 3, sharded=False)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            __file__,
            str(folder),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **asked}
        )
        if not any(signal in done.stderr for signal in ("(SIGABRT)", "(SIGSEGV)")):
            break
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", list(CASES))
def test_two_sharded_processes_compute_what_one_whole_does(sharded, tmp_path, name):
    train(name, tmp_path, sharded=False)
    gathered = torch.load(sharded / f"{name}.pt", weights_only=True)
    mine, theirs = (checkpoint.newest(run) for run in (tmp_path, sharded / name))
    assert {p.name for p in mine.iterdir()} == {p.name for p in theirs.iterdir()}
    for file in mine.glob("*.safetensors"):
        whole, shards = load_file(file), load_file(theirs / file.name)
        assert whole.keys() == shards.keys() == gathered[file.stem].keys()
        for key, value in whole.items():
            close = CLOSE.get(name, 2e-5)
            torch.testing.assert_close(shards[key], value, rtol=1e-4, atol=close)
            assert torch.equal(shards[key], gathered[file.stem][key]), key
    state, expected = (checkpoint.load(path)[0]["optimizer"] for path in (theirs, mine))
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for i, values in expected["state"].items():
        for key, value in values.items():
            close = CLOSE.get(name, 2e-5)
            torch.testing.assert_close(state["state"][i][key], value, rtol=1e-4, atol=close)
    kept = [[p.name for p in posthoc_files(run)] for run in (tmp_path, sharded / name)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == (6 if name == "uvit" else 0)  # of two widths at steps 2, 4 and 5
    for mine, theirs in zip(posthoc_files(tmp_path), posthoc_files(sharded / name), strict=True):
        whole, shards = load_file(mine), load_file(theirs)
        for key, value in whole.items():
            torch.testing.assert_close(shards[key], value, rtol=1e-4, atol=2e-5)
    norms = [
        [line["grad_norm"] for line in logged(run) if "grad_norm" in line]
        for run in (tmp_path, sharded / name)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2 if name in CLOSE else 1e-4)
    assert max(norms[0]) > COMMON["optim"]["clip_grad_norm"]
    # Pictures and distances come from a whole copy.
    pictures = [
        sorted(p.name for p in (run / "previews").iterdir()) for run in (tmp_path, sharded / name)
    ]
    assert pictures[0] == pictures[1] != []
    if "eval" in CASES[name]:
        best = [json.loads((run / "best.json").read_text()) for run in (tmp_path, sharded / name)]
        assert best[0]["images"] == best[1]["images"]
        assert best[0]["value"] == pytest.approx(best[1]["value"], rel=1e-2)


def test_autocast_is_on_where_asked_for(sharded):
    norms = [
        [line["grad_norm"] for line in logged(sharded / name) if "grad_norm" in line]
        for name in CASES
    ]
    assert norms[0] != pytest.approx(norms[1], rel=1e-4)
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


@pytest.mark.parametrize("name", RESUMED)
def test_a_sharded_run_resumes_bit_for_bit_and_goes_on_from_a_whole_one_and_into_one(
    sharded, tmp_path, name
):
    resumed, through = (
        checkpoint.load(checkpoint.newest(sharded / run)) for run in (f"{name}-resumed", name)
    )
    for stem, tensors in through[1].items():
        assert all(torch.equal(resumed[1][stem][key], value) for key, value in tensors.items()), (
            stem
        )
    for i, values in through[0]["optimizer"]["state"].items():
        assert all(
            torch.equal(resumed[0]["optimizer"]["state"][i][key], value)
            for key, value in values.items()
        )
    begun_whole = checkpoint.load(checkpoint.newest(sharded / f"{name}-begun-whole"))[1]
    for stem, tensors in through[1].items():
        for key, value in tensors.items():
            torch.testing.assert_close(begun_whole[stem][key], value, rtol=1e-4, atol=2e-5)
    shutil.copytree(sharded / name, tmp_path / "sharded")
    for run in ("sharded", "whole"):
        train(name, tmp_path / run, STEPS + 1, sharded=False)
    found, expected = (
        load_file(tmp_path / run / "weights.safetensors") for run in ("sharded", "whole")
    )
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)


def test_a_gradient_that_is_not_finite_on_one_process_stops_the_step_of_all(sharded):
    state, networks = checkpoint.load(checkpoint.newest(sharded / "poisoned"))
    assert state["skipped"] == 1
    assert {int(values["step"]) for values in state["optimizer"]["state"].values()} == {STEPS - 1}
    assert all(torch.isfinite(value).all() for value in networks["model"].values())


@pytest.mark.parametrize(
    ("environment", "precision", "words"),
    [
        ({"FSDP_VERSION": "1"}, "fp32", "fsdp_version: 2"),
        ({}, "fp32", "fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fp32", "fsdp_offload_params"),
        (
            {"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "fp32",
            "train.gradient_checkpointing=true",
        ),
        ({"FSDP_VERSION": "2"}, "fp16", "bf16 or fp32"),
    ],
)
def test_what_does_not_work_is_refused(environment, precision, words):
    with (
        mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true", **environment}),
        pytest.raises(UsageError, match=words),
    ):
        sharding.plugin(precision)


def test_sharding_without_gpus_is_refused(cli):
    command = ["pretrain", "--data", "digits", "--run", "r", "--set", "train.steps=1"]
    done = cli(*command, code=2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert "a GPU each" in done.stderr


if __name__ == "__main__":
    train_sharded(Path(sys.argv[1]))
