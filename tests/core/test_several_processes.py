"""Several processes train as one: same parameters, the gradients of one process, noise and masks of
their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from msmdiff.core import config as configuration
from msmdiff.core.training import launch
from msmdiff.core.training.run import Run
from msmdiff.core.training.trainer import Trainer

STEPS = 10
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
}
# A fine-tuning without a mask: the side block gets no gradients, which must not stop the processes.
UNMASKED = {**MDT, "objective": {"name": "dsm"}}
ALIGNED = {**UVIT, "objective": {"alignment": "sra"}}
CASES = {"uvit": UVIT, "sra": ALIGNED, "mdtv2": MDT, "mdtv2-unmasked": UNMASKED}
COMMON = {
    "train": {
        "batch_size": 8,
        "micro_batch_size": 4,
        "steps": STEPS,
        "preview_every": 0,
        "precision": "fp32",
        "log_every": 1,
    },
    "optim": {"lr": 1e-3},
}


class Silent:
    def note(self, text):
        pass

    def progress(self, *_):
        pass

    def activity(self, *_):
        pass


def train(name, folder, target):
    """Train, and keep the first step's gradients and what every pass drew."""
    trainer = Trainer(configuration.build(COMMON, CASES[name]), Path(folder), Silent(), False, "")
    step, seen = trainer.step, {"draws": []}
    terms, clipped_norm = trainer.parts.objective.terms, step._clipped_norm

    def spy(model, x0, eps, t, y, route):
        keep = None if route is None else route.keep
        seen["draws"].append({"x0": x0, "eps": eps, "t": t, "keep": keep})
        return terms(model, x0, eps, t, y, route)

    def watch(*given):
        if "gradients" not in seen:
            named = trainer.accelerator.unwrap_model(step.model).named_parameters()
            seen["gradients"] = {n: p.grad.clone() for n, p in named if p.grad is not None}
        return clipped_norm(*given)

    trainer.parts.objective.terms, step._clipped_norm = spy, watch
    with launch.Signals() as signals:
        trainer.fit(signals)
    seen["parameters"] = trainer.accelerator.unwrap_model(step.model).state_dict()
    if step.alignment is not None:
        seen["parameters"] |= step.alignment.state_dict()["projector"]
    seen["threads"] = torch.get_num_threads()
    torch.save(seen, target)
    trainer.close()


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_compute_what_one_does(tmp_path, name):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        __file__,
        name,
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    train(name, tmp_path / "one", tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    for key, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][key]), key
        torch.testing.assert_close(value, one["parameters"][key], rtol=1e-4, atol=2e-5)
    assert first["gradients"].keys() == one["gradients"].keys()
    for key, value in first["gradients"].items():
        assert torch.equal(value, second["gradients"][key]), key
        torch.testing.assert_close(value, one["gradients"][key], rtol=1e-4, atol=1e-6)
    logged = [Run(tmp_path / run, writes=False).metrics()[0] for run in ("one", "run")]
    # Of all processes, not of the first.
    assert logged[1]["loss"] == pytest.approx(logged[0]["loss"], rel=1e-4)
    assert len(one["draws"]) == len(first["draws"]) + len(second["draws"])
    for a, b in zip(first["draws"], second["draws"], strict=True):
        assert not torch.equal(a["eps"], b["eps"])
        assert a["keep"] is None or not torch.equal(a["keep"], b["keep"])
    # The micro-batches of one process are those of two, dealt in turn.
    passes = len(one["draws"]) // (2 * STEPS)
    for i in range(passes):
        for mine, both in zip(one["draws"][i : 2 * passes : passes], (first, second), strict=True):
            assert torch.equal(mine["eps"], both["draws"][i]["eps"])


if __name__ == "__main__":
    train(sys.argv[1], f"{sys.argv[2]}/run", f"{sys.argv[2]}/rank{os.environ['RANK']}.pt")
