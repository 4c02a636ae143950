"""The distance of two sets of images, from Python."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import evaluate, scores
from msmdiff.core.metrics import features as extractors
from msmdiff.core.metrics.inputs import Images, open_input


class Given(Images):
    """Images that are at hand: uint8 [N, 3, H, W]."""

    def __init__(self, images: Tensor, name: str) -> None:
        super().__init__(name)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UsageError(
                f"{name} is {images.dtype} {list(images.shape)}: give images as uint8 [N, 3, H, W]"
            )
        if len(images) < 2:
            raise UsageError(f"{name} holds {len(images)} image: a distance needs at least two")
        self.images = images
        self.settings = {"image_size": f"{images.shape[3]}x{images.shape[2]}"}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Tensor]:
        for start in range(0, len(indices), batch_size):
            yield self.images[list(indices[start : start + batch_size])].cpu()


def distance(
    a: str | Path | Tensor,
    b: str | Path | Tensor,
    *,
    features: str = "pixel",
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> float:
    """The Fréchet distance of two sets: `distance(model.draw(500), "digits:test")`.

    Args:
        a, b: what `msmdiff fid` takes (folders, zips, `.npz`, runs), or uint8 [N, 3, H, W].
        features: what images are compared by, as `msmdiff list features` says. Pixels, the default,
            need nothing and are not FID; `inception` is FID.
        weights: the features' weights file.
        device: where the features are computed.
        options: of `open_input`: `n` samples of a run, a `crop` of images on disk.

    Raises UsageError for sets that do not compare, and MsmdiffError for images that cannot be read.
    """
    sets = [_opened(each, name, device, options) for name, each in (("a", a), ("b", b))]
    made = extractors.build(features, None if weights is None else Path(weights), device)
    evaluate.check(sets[0], sets[1], made)
    first, second = (evaluate.of_input(each, made, 64) for each in sets)
    return scores.compare(first, second, made).value


def _opened(
    given: str | Path | Tensor, name: str, device: torch.device | str, options: dict[str, Any]
) -> Images:
    if isinstance(given, Tensor):
        return Given(given, name)
    return open_input(str(given), device=device, **options)
