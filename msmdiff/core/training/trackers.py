"""TensorBoard and wandb, through Accelerate: the pictures of a run beside its figures."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msmdiff.core.training import previews


def pictures(accelerator: Any, stem: Path, step: int) -> None:
    """Show what `previews.draw` wrote under `stem`; nothing without trackers."""
    drawn = {"samples": previews.samples_at(stem), "masked": previews.masked_at(stem)}
    for name, path in drawn.items():
        if not path.is_file() or not accelerator.trackers:
            continue
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({name: [pixels]}, step=step)
            else:
                tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
