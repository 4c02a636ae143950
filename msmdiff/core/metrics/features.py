"""What images are compared by: Inception's pooled features, or plain pixels for tiny images and offline use."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from msmdiff.core.diffusion.codecs import to_unit
from msmdiff.core.errors import MsmdiffError, UsageError

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
"""How the published file's sha256 begins, as its name says."""


class Features(Protocol):
    """Maps images to vectors.

    Attributes:
        name: identifies what was computed, weights included; statistics of different names are not comparable.
        title: what a distance over these features is called.
        width: of a vector.
    """

    name: str
    title: str
    width: int

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float [B, width]."""


class PixelFeatures:
    """The image averaged over an 8x8 grid of areas, three colours in -1..1: 192 numbers. Not FID."""

    name, title, width = "pixel-8x8", "pixel Fréchet distance", 192

    def __call__(self, images: Tensor) -> Tensor:
        if min(images.shape[-2:]) < 8:
            raise UsageError(f"--features pixel needs images of at least 8x8 pixels, not {list(images.shape[-2:])}")
        return F.adaptive_avg_pool2d(to_unit(images), 8).flatten(1)


class InceptionFeatures:
    """The 2048 pooled features of pytorch-fid's Inception-v3, images resized to 299 by its own rule.

    Args:
        weights: a file in the layout of pytorch-fid's; None looks in torch hub's cache and then downloads.
        device: where it runs.

    Raises MsmdiffError when no weights can be had, or the cached file is not the published one.
    """

    width = 2048

    def __init__(self, weights: Path | None, device: torch.device | str = "cpu") -> None:
        from pytorch_fid import inception

        path = weights or _published_weights()
        if not path.is_file():
            raise MsmdiffError(f"--weights {path} does not exist: give {INCEPTION_FILE} from pytorch-fid's releases")
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        published = checksum.startswith(INCEPTION_SHA256)
        if weights is None and not published:
            raise MsmdiffError(
                f"{path} has sha256 {checksum[:8]}..., not {INCEPTION_SHA256}...: it is damaged; remove it, or give "
                "the right file with --weights"
            )
        self.name = f"inception-2048/{checksum[:8]}"
        self.title = (
            "FID" if published else f"Fréchet Inception distance with weights {checksum[:8]} (not the published ones)"
        )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            # pytorch-fid builds the network and downloads its weights in one function; hand it ours instead.
            with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
                self._network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
        except Exception as error:  # unpickling a damaged file, or loading other tensors, can raise nearly anything
            reason = " ".join(str(error).split())[:200]
            raise MsmdiffError(f"{path} does not hold pytorch-fid's Inception weights: {reason}") from None
        self._device = torch.device(device)
        self._network = self._network.to(self._device, memory_format=torch.channels_last).eval()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self._device).float().div_(255).contiguous(memory_format=torch.channels_last)
        return self._network(x)[0].flatten(1)


def _published_weights() -> Path:
    """pytorch-fid's file in torch hub's cache, downloaded there when it is not."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        from pytorch_fid.inception import FID_WEIGHTS_URL

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise MsmdiffError(
                f"Inception weights are neither at {path} nor can they be downloaded ({error}): get {INCEPTION_FILE} "
                f"(sha256 {INCEPTION_SHA256}...) from pytorch-fid's releases and pass it with --weights FILE, or "
                "compare with --features pixel"
            ) from None
    return path


FEATURES: dict[str, Callable[[Path | None, torch.device | str], Features]] = {
    "inception": InceptionFeatures,
    "pixel": lambda weights, device: PixelFeatures(),
}
