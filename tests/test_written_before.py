"""Runs that version 0.1.0 wrote open, resume and sample as they did then.

`written_before/NAME/` is a run of ten steps of the preset NAME, its network shrunk to a few
kilobytes. `expected.json` holds the command that trained it, what version 0.1.0 made of it by
resuming it to twenty steps, and the images that it sampled from the ten-step weights.

On a machine like the one that wrote it (`machine`) every bit must agree; elsewhere sums are
taken in another order, and norms and means must be close.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import msmdiff

FOLDER = Path(__file__).parent / "written_before"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
PRESETS = sorted(EXPECTED["presets"])
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def this_machine() -> dict[str, str]:
    """What decides the last bits of a training on a CPU."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.is_file() else []
    vendor = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return {
        "torch": torch.__version__,
        "cpu": (vendor or ["unknown"])[0],
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def describe_networks(checkpoint: Path) -> dict[str, Any]:
    """Of every network in a checkpoint: the hash of all tensors in a row, and each one's norm."""
    described = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors = sorted(load_file(path).items())
        digest = hashlib.sha256()
        for name, tensor in tensors:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        norms = {name: float(tensor.double().norm()) for name, tensor in tensors}
        described[path.stem] = {"sha256": digest.hexdigest(), "norms": norms}
    return described


def describe_images(folder: Path) -> dict[str, Any]:
    """The hash of a folder's pixels in the order of its names, and their mean."""
    paths = sorted(folder.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    return {
        "shape": list(pixels.shape),
        "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
        "mean": float(pixels.mean()),
    }


def resume_arguments(name: str) -> list[str]:
    """The command that trained the run, up to step 20."""
    first = EXPECTED["presets"][name]["arguments"]
    return [text.replace("train.steps=10", "train.steps=20") for text in first]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A copy of all runs, where the command line looks for them."""
    for name in PRESETS:
        shutil.copytree(FOLDER / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_resumes_to_the_same_weights(name, runs, cli):
    cli(*resume_arguments(name), **ONE_THREAD)
    checkpoint = runs / name / "checkpoints" / "img-000000320"
    found = describe_networks(checkpoint)
    wanted = EXPECTED["presets"][name]["resumed"]
    assert found.keys() == wanted.keys()
    for network in wanted:
        norms = found[network]["norms"]
        assert norms == pytest.approx(wanted[network]["norms"], rel=1e-4, abs=1e-7)
    if this_machine() == EXPECTED["machine"]:
        hashes = {network: content["sha256"] for network, content in found.items()}
        assert hashes == {network: content["sha256"] for network, content in wanted.items()}
    steps = [json.loads(line)["step"] for line in (runs / name / "metrics.jsonl").open()]
    assert steps == [10, 20]


@pytest.mark.parametrize("name", PRESETS)
def test_weights_open_and_sample_the_same_images(name, runs, tmp_path, cli):
    model = msmdiff.load(runs / name / "weights.safetensors")
    assert model is not None
    cli("sample", f"runs/{name}", "--seeds", "0-3", "--no-grid", "--out", "out", **ONE_THREAD)
    found = describe_images(tmp_path / "out")
    wanted = EXPECTED["presets"][name]["sampled"]
    assert found["shape"] == wanted["shape"]
    assert found["mean"] == pytest.approx(wanted["mean"], abs=0.5)
    if this_machine() == EXPECTED["machine"]:
        assert found["sha256"] == wanted["sha256"]
