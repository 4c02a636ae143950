"""Single pictures to look at: an interpolation, fillings of an image, predictions over time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmdiff.core.data.images import center_crop, read_rgb
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.model import Model
from msmdiff.core.samplers import editing
from msmdiff.core.seeding import SeedNoise, parse_range, stream

Draw = Callable[..., Tensor]
"""The images of some seeds, in one batch: (seeds, start=..., wraps=...) -> uint8 [N, 3, H, W]."""


def interpolation(model: Model, wish: Any, draw: Draw) -> tuple[Tensor, int]:
    """Images between two seeds, and the columns to lay them in.

    Raises UsageError unless `wish.interpolate` names two seeds, and two images or more are wanted.
    """
    ends, count = parse_range(str(wish.interpolate), "--interpolate"), len(wish.seeds)
    if len(ends) != 2 or count < 2:
        raise UsageError(
            f"--interpolate {wish.interpolate}: give two seeds A,B, and at least 2 images (--n)"
        )
    a, b = SeedNoise(ends, model.codec.shape, "cpu")()
    images = draw(ends[:1] * count, start=editing.slerp(a, b, count))
    return images, min(count, 12)


def fillings(model: Model, wish: Any, draw: Draw) -> tuple[Tensor, int]:
    """An image with its masked part grey, then filled in for each seed.

    Raises UsageError for a mask that is black, or of another size than the image.
    """
    image, painted = wish.inpaint
    known, mask = _cropped_alike(image, painted, model.config.data.image_size)
    held = mask.float().mean(1, keepdim=True) < 128
    if held.all():
        raise UsageError(f"--inpaint {painted} is black: paint white what is to be filled in")
    x0 = model.codec.encode(known.to(model.device), stream(model.device, 0, "inpaint"))
    place = editing.wholly_kept(held.to(model.device), model.codec.shape[1])
    made = draw(wish.seeds, wraps=[editing.inpainting(model.process, x0, place)])
    images = torch.cat([torch.where(held, known, 128), torch.where(held, known, made)])
    return images, min(len(images), 12)


def over_time(model: Model, wish: Any, draw: Draw) -> tuple[Tensor, int]:
    """What the network takes for the clean image at ten times, a row for each of eight seeds."""
    watch, rounding = editing.Trajectory(), model.config.sample.rounding
    made = draw(wish.seeds[:8], wraps=[watch.wrap])
    stages = [model.codec.decode(x0, rounding).cpu() for x0 in watch.pick(10)]
    rows = torch.stack([*stages, made], dim=1)
    return rows.flatten(0, 1), rows.shape[1]


KINDS = {"interpolate": interpolation, "inpaint": fillings, "trajectory": over_time}
"""By the name of the option that asks for them."""


def _cropped_alike(image: Path, mask: Path, side: int) -> list[Tensor]:
    """Two images of one size, each uint8 [1, 3, side, side]."""
    opened = []
    for path in (image, mask):
        try:
            opened.append(read_rgb(path))
        except MsmdiffError as error:
            raise UsageError(f"--inpaint {error}") from None
    (width, height), masked = (picture.size for picture in opened)
    if masked != (width, height):
        raise UsageError(
            f"--inpaint {mask} is {masked[0]}x{masked[1]}, and must be {width}x{height} "
            f"like {image}"
        )
    return [
        torch.from_numpy(center_crop(each, side).copy()).permute(2, 0, 1)[None] for each in opened
    ]
