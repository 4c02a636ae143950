"""Inception-v3's features as pytorch-fid, clean-fid and ADM's evaluator take them."""

from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from msmdiff.core import files, hub, tensor_files
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics.features import Features, clean, one_line
from msmdiff.core.registry import Options, register

INCEPTION_FILE, INCEPTION_SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
"""The published file, and how its sha256 begins."""


def _tensorflow(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear: output i lies at i x in / out, where others take (i + 1/2) x in /
    out - 1/2.
    """
    x = images.float()
    for axis in (2, 3):
        at = torch.arange(size, device=x.device) * (x.shape[axis] / size)
        low = at.floor().long()
        last = x.shape[axis] - 1
        first = x.index_select(axis, low.clamp(max=last))
        second = x.index_select(axis, (low + 1).clamp(max=last))
        share = (at - low).view(-1, 1) if axis == 2 else at - low
        x = first + (second - first) * share
    return x


def pytorch_fid_rule(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> the network's input of a side, as pytorch-fid brings it there."""
    return F.interpolate(images.float(), (size, size), mode="bilinear") / 127.5 - 1


def clean_rule(images: Tensor, size: int) -> Tensor:
    """As clean-fid does."""
    return (clean(images, size) - 128) / 128


def adm_rule(images: Tensor, size: int) -> Tensor:
    """As ADM's evaluator does."""
    return (_tensorflow(images, size) - 128) / 128


RESIZES = {"pytorch-fid": pytorch_fid_rule, "clean": clean_rule, "adm": adm_rule}


class InceptionOptions(Options):
    resize: Literal["pytorch-fid", "clean", "adm"] = Field(
        "pytorch-fid", description="Whose rule brings images to 299 pixels."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="The precision of the network.")


@register("features", "inception", InceptionOptions)
class InceptionFeatures(Features):
    """The 2048 pooled features of pytorch-fid's Inception-v3, and with `spatial` ADM's: 7 channels
    of `mixed_6`.

    Args:
        weights: a file in pytorch-fid's layout; None looks in MSMDIFF_CACHE and torch hub's cache,
            then downloads.
        resize: one of RESIZES.
        precision: fp32, or bf16 for the whole network.

    Raises MsmdiffError when no weights can be had, or a file of the published name is not the
    published one.
    """

    prefix, offers = "inception-", frozenset({"spatial", "classes"})
    width, metric = 2048, "fid"

    def __init__(
        self,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        resize: str = "pytorch-fid",
        precision: str = "fp32",
        spatial: bool = False,
    ) -> None:
        path = weights or _published_weights()
        if not path.is_file():
            raise UsageError(
                f"--weights {path} does not exist: give {INCEPTION_FILE} from "
                "pytorch-fid's releases"
            )
        checksum = files.checksum(path)[:8]
        if checksum != INCEPTION_SHA256 and path.name == INCEPTION_FILE:
            raise MsmdiffError(
                f"{path} has sha256 {checksum}..., not {INCEPTION_SHA256}...: it is damaged; "
                "remove it, or give the "
                "right file with --weights"
            )
        self.name = f"inception-2048/{checksum}"
        self.title, self.suffix = self.titles(self.name)
        try:
            state = tensor_files.read(path)
            network: Any = _pytorch_fid_network(state)
        except Exception as error:  # a damaged file, or other tensors, can raise nearly anything
            raise MsmdiffError(
                f"{path} does not hold pytorch-fid's Inception weights: {one_line(error)}"
            ) from None
        for module in network.modules():
            if hasattr(module, "bn"):
                module.conv = torch.nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = torch.nn.Identity()
        self.resize, self.precision, self.device = resize, precision, torch.device(device)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._network = network.to(self.device, self._dtype, memory_format=torch.channels_last)
        self._classes, self._spatial = state["fc.weight"].double().T, list[Tensor]()
        if spatial:
            # torchvision's Mixed_6d is what ADM's graph calls mixed_6; its first branch ends in
            # mixed_6/conv.
            self.spatial_width = 7 * 17 * 17
            network.Mixed_6d.branch1x1.register_forward_hook(
                lambda *a: self._spatial.append(a[2][:, :7])
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = RESIZES[self.resize](images.to(self.device), 299)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pooled = self._network(x.to(self._dtype, memory_format=torch.channels_last))
        vectors = pooled.flatten(1).float()
        if not self.spatial_width:
            return vectors, None
        # ADM's order of the spatial features is rows, columns, channels.
        return vectors, self._spatial.pop().permute(0, 2, 3, 1).flatten(1).float()

    def probabilities(self, features: Tensor) -> Tensor:
        # Published Inception Scores have no bias here.
        return (features.double() @ self._classes).softmax(1)

    @classmethod
    def titles(cls, name: str) -> tuple[str, str]:
        checksum = name.rpartition("/")[2]
        if checksum == INCEPTION_SHA256:
            return "FID", ""
        suffix = f" with weights {checksum} (not the published ones)"
        return f"Fréchet Inception distance{suffix}", suffix


MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


def _pytorch_fid_network(state: dict[str, Tensor]) -> nn.Sequential:
    """pytorch-fid's Inception up to its pooled features, with the given weights.

    The package's own constructor downloads the published ones, so that its pieces are put together
    here: torchvision's network, of which nine modules are TensorFlow's.
    """
    from pytorch_fid import inception
    from torchvision.models import inception_v3

    whole = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    whole.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
    whole.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
    whole.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
    whole.Mixed_6b = inception.FIDInceptionC(768, channels_7x7=128)
    whole.Mixed_6c = inception.FIDInceptionC(768, channels_7x7=160)
    whole.Mixed_6d = inception.FIDInceptionC(768, channels_7x7=160)
    whole.Mixed_6e = inception.FIDInceptionC(768, channels_7x7=192)
    whole.Mixed_7b = inception.FIDInceptionE_1(1280)
    whole.Mixed_7c = inception.FIDInceptionE_2(2048)
    whole.load_state_dict(state)
    first = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1")
    second = ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2")
    mixed = [f"Mixed_{name}" for name in MIXED]
    names = (*first, *second, *mixed, "avgpool")
    blocks = OrderedDict((name, getattr(whole, name)) for name in names)
    return nn.Sequential(blocks).eval().requires_grad_(False)


def _published_weights() -> Path:
    """pytorch-fid's file in MSMDIFF_CACHE or torch hub's cache, downloaded to the latter when it is
    in neither.
    """
    theirs, ours = (
        Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE,
        files.cache_folder() / INCEPTION_FILE,
    )
    if not ours.is_file() and not theirs.is_file():
        from pytorch_fid.inception import FID_WEIGHTS_URL

        try:
            theirs.parent.mkdir(parents=True, exist_ok=True)
            hub.require(FID_WEIGHTS_URL)
            torch.hub.download_url_to_file(
                FID_WEIGHTS_URL, str(theirs), hash_prefix=INCEPTION_SHA256
            )
        except (OSError, RuntimeError) as error:
            raise MsmdiffError(
                f"Inception weights are neither at {ours} nor at {theirs}, nor can they be "
                f"downloaded ({error}): get "
                f"{INCEPTION_FILE} (sha256 {INCEPTION_SHA256}...) from pytorch-fid's releases and "
                "pass it with "
                "--weights FILE, or compare with --features pixel"
            ) from None
    return ours if ours.is_file() else theirs
