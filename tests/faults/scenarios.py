"""Command lines that write, what they need, and what they leave: compared number for number."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from msmdiff.core import backbones, tensor_files, weights
from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core.data import latents
from msmdiff.core.sections import ModelConfig
from msmdiff.core.weights import published

TINY = {"name": "tiny", "hidden_size": 16, "num_heads": 2, "depth": 3}


def make_inputs(folder: Path) -> Path:
    """Photos in two classes, weights of ours, and a checkpoint in DiT's layout; beside them a file
    of the user's.
    """
    rng = np.random.default_rng(0)
    for i in range(9):
        place = folder / "photos" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).save(place / f"{i}.png")
    torch.manual_seed(0)
    config = road.resolve(configuration.build({"model": {**TINY, "num_classes": 10}}))
    network = road.build(config).backbone
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    weights.save(folder / "w.safetensors", network.state_dict(), config)
    fields: dict[str, Any] = dict(patch_size=2, hidden_size=16, depth=2, num_heads=2)
    model = backbones.resolve(
        ModelConfig(name=None, family="dit", num_classes=3, learn_sigma=True, **fields)
    )
    state = backbones.build(model, (4, 8, 8)).state_dict()
    torch.save(published.export(state, model, (4, 8, 8), "dit"), folder / "dit.pt")
    (folder / "thesis.txt").write_text("three years of work")
    return folder


@dataclass
class Scenario:
    """A command line, without the program's name, and the files that it reads."""

    words: str
    inputs: tuple[str, ...]

    @property
    def argv(self) -> list[str]:
        return self.words.split()

    def prepare(self, made: Path, folder: Path) -> Path:
        """An empty folder with what the command reads, and the user's file."""
        folder.mkdir(parents=True)
        for name in (*self.inputs, "thesis.txt"):
            if (made / name).is_dir():
                shutil.copytree(made / name, folder / name)
            else:
                shutil.copy2(made / name, folder / name)
        return folder


SCENARIOS = {
    "train": Scenario(
        "pretrain --run r --steps 5 --batch-size 8 --set data.workers=0 --set train.log_every=1 "
        "--set train.checkpoint_every=2 --set train.preview_every=4 --set train.keep_checkpoints=2 "
        "--set sample.steps=2 --set model.hidden_size=16 --set model.num_heads=2 "
        "--set model.depth=3",
        (),
    ),
    "encode": Scenario(
        "data encode photos -o packed --codec pixel --image-size 8 --shard 4 --batch-size 2",
        ("photos",),
    ),
    "pack": Scenario("data pack photos -o photos.zip", ("photos",)),
    "sample": Scenario(
        "sample w.safetensors --n 5 --steps 2 --batch-size 2 --out out --npz s.npz "
        "--stats stats.npz --features pixel",
        ("w.safetensors",),
    ),
    "stats": Scenario(
        "fid stats photos --features pixel --workers 0 -o stats.npz --json scores.json",
        ("photos",),
    ),
    "convert": Scenario(
        "weights convert dit.pt -o dit.safetensors --set model.num_heads=2", ("dit.pt",)
    ),
    "export": Scenario(
        "weights export w.safetensors --format uvit -o nnet.pth", ("w.safetensors",)
    ),
}


def numbers(folder: Path) -> dict[str, str]:
    """What lies in a folder: a digest of each file; of times, and folders, only that they are
    there.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != ".lock":
            digest = _digest(path) if path.is_file() else "folder"
            found[str(path.relative_to(folder))] = digest
    return found


def _digest(path: Path) -> str:
    if path.name == "run.json":
        return "circumstances"
    if path.name == "shards.txt":  # a line that a kill cut short stays there, and does not count
        return f"{sorted(latents.finished(path.parent))}"
    if path.name == "DONE":
        return " ".join(sorted(json.loads(path.read_bytes())))
    if path.name == "state.pt":
        return hashlib.sha256(repr(_timeless(tensor_files.read(path))).encode()).hexdigest()
    content = path.read_bytes()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        kept = [{k: v for k, v in line.items() if not _is_speed(k)} for line in lines]
        content = json.dumps(kept).encode()
    return hashlib.sha256(content).hexdigest()


def _timeless(content: Any) -> Any:
    """A training's state, as lists and numbers, without how long it took."""
    if isinstance(content, dict):
        return [(key, _timeless(v)) for key, v in content.items() if not _is_speed(str(key))]
    if isinstance(content, list | tuple):
        return [_timeless(each) for each in content]
    if isinstance(content, torch.Tensor):
        return [str(content.dtype), content.tolist()]
    return content


def _is_speed(key: str) -> bool:
    words = ("_per_s", "seconds", "time", "wait", "memory", "fraction", "ms_", "flops")
    return any(word in key for word in words)
