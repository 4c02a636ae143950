"""What trainings take at their peak, beside what was estimated: each in a process of its own that
begins where all imports are done. Prints one line of JSON for each.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from msmdiff.core import build as road
from msmdiff.core import config as configuration
from msmdiff.core import presets
from msmdiff.core.training import memory, meter
from msmdiff.core.training.trainer import train

FEW = {
    "train.steps": 1,
    "train.log_every": 1,
    "train.preview_every": 0,
    "train.threads": 1,
    "train.precision": "fp32",
    "eval.heldout_n": 1,
    "data.workers": 0,
}


class Silent:
    """A reporter that says nothing."""

    def note(self, *_: object) -> None:
        pass

    progress = activity = note


def measured(preset: str, batch_size: int) -> dict[str, float]:
    """The estimate and the peak, in bytes."""
    few = configuration.nest({**FEW, "train.batch_size": batch_size})
    config = configuration.build(presets.read(preset), few)
    estimate = memory.estimate(road.resolve(config.model_copy(deep=True), 10))
    meter.forget_peak(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", Silent())
    peak = meter.peak_memory(torch.device("cpu"))
    return {"estimate": estimate.total, "activations": estimate.activations, "peak": peak}


if __name__ == "__main__":
    for words in sys.argv[1:]:
        preset, _, size = words.partition("=")
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            continue
        print(json.dumps({"preset": preset, **measured(preset, int(size))}), flush=True)
        os._exit(0)
