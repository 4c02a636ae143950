"""What images are compared by: Inception's features, DINOv2's, or plain pixels for tiny images and
offline use.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from msmdiff.core import files
from msmdiff.core.data.loader import cache_folder
from msmdiff.core.diffusion.codecs import to_unit
from msmdiff.core.errors import MsmdiffError, UsageError

INCEPTION_FILE, INCEPTION_SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
"""The published file, and how its sha256 begins."""
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
PREFIXES = {"inception": "inception-", "dinov2": DINOV2.partition(".")[0], "pixel": "pixel-"}
"""How `Features.name` begins for each `--features`, by which statistics are known."""


class Features:
    """Maps images to vectors of `width`, and where `spatial_width` is not 0 to the second ones that
    sFID takes.

    `name` tells what was computed, weights included; `metric` and `title` are what a Fréchet
    distance over it is called by scripts and by people, and `suffix` follows other metrics' names.
    `resize` is the rule by which images are brought to the network's size.
    """

    name = title = metric = suffix = resize = ""
    width = spatial_width = 0
    precision, device = "fp32", torch.device("cpu")

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [B, 3, H, W] -> float32 [B, width], and [B, spatial_width] where there is such a
        vector.
        """
        raise NotImplementedError

    def probabilities(self, features: Tensor) -> Tensor:
        """[N, width] -> [N, classes] float64, for the Inception Score."""
        raise NotImplementedError

    def settings(self) -> dict[str, str]:
        """What statistics must share to be compared."""
        return {"features": self.name, "resize": self.resize, "precision": self.precision}


class PixelFeatures(Features):
    """The image averaged over an 8x8 grid of areas, three colours in -1..1: 192 numbers. Not FID."""

    name, width, resize = "pixel-8x8", 192, "area"
    metric, title, suffix = "fd_pixel", "pixel Fréchet distance", " over pixels"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        if min(images.shape[-2:]) < 8:
            raise UsageError(
                "--features pixel needs images of at least 8x8 pixels, not "
                f"{list(images.shape[-2:])}"
            )
        return F.adaptive_avg_pool2d(to_unit(images), 8).flatten(1), None


def clean(images: Tensor, size: int) -> Tensor:
    """Pillow's antialiased bicubic in float, clipped (Parmar et al. 2022): [B, 3, H, W] -> 0..255."""
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)


def _tensorflow(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear: output i lies at i x in / out, where others take (i + 1/2) x in /
    out - 1/2.
    """
    x = images.float()
    for axis in (2, 3):
        at = torch.arange(size, device=x.device) * (x.shape[axis] / size)
        low = at.floor().long()
        first, second = (
            x.index_select(axis, i.clamp(max=x.shape[axis] - 1)) for i in (low, low + 1)
        )
        x = first + (second - first) * (at - low).view(-1, *[1] * (3 - axis))
    return x


RESIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pytorch-fid": lambda images, size: (
        F.interpolate(images.float(), (size, size), mode="bilinear") / 127.5 - 1
    ),
    "clean": lambda images, size: (clean(images, size) - 128) / 128,
    "adm": lambda images, size: (_tensorflow(images, size) - 128) / 128,
}
"""uint8 [B, 3, H, W] and a side -> the network's input, by the rule of pytorch-fid, clean-fid, or
ADM's evaluator.
"""


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

    width, metric = 2048, "fid"

    def __init__(
        self,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        resize: str = "pytorch-fid",
        precision: str = "fp32",
        spatial: bool = False,
    ) -> None:
        from pytorch_fid import inception

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
        self.suffix = (
            ""
            if checksum == INCEPTION_SHA256
            else f" with weights {checksum} (not the published ones)"
        )
        self.title = f"Fréchet Inception distance{self.suffix}" if self.suffix else "FID"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            # pytorch-fid builds the network and downloads its weights in one function; hand it ours
            # instead.
            with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
                network = inception.InceptionV3(
                    [3], resize_input=False, normalize_input=False
                ).eval()
        except Exception as error:  # unpickling a damaged file, or loading other tensors, can raise nearly anything
            raise MsmdiffError(
                f"{path} does not hold pytorch-fid's Inception weights: {_short(error)}"
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
            network.blocks[2][6].branch1x1.register_forward_hook(
                lambda *a: self._spatial.append(a[2][:, :7])
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = RESIZES[self.resize](images.to(self.device), 299)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pooled = (
                self._network(x.to(self._dtype, memory_format=torch.channels_last))[0]
                .flatten(1)
                .float()
            )
        # ADM's order of the spatial features is rows, columns, channels.
        return pooled, self._spatial.pop().permute(0, 2, 3, 1).flatten(
            1
        ).float() if self.spatial_width else None

    def probabilities(self, features: Tensor) -> Tensor:
        return (features.double() @ self._classes).softmax(
            1
        )  # published Inception Scores have no bias here


class DinoFeatures(Features):
    """DINOv2's class token after the last norm, of images brought to 224 by the clean rule (Stein
    et al. 2023).

    Args:
        weights: the published file, or timm's; None takes timm's from the hub or its cache.
        model: timm's name; published distances are of ViT-L/14.

    Raises MsmdiffError when no weights can be had, or they are another network's.
    """

    resize, metric, suffix = "clean", "fd_dinov2", " over DINOv2"

    def __init__(
        self, weights: Path | None, device: torch.device | str = "cpu", model: str = DINOV2
    ) -> None:
        import timm

        try:
            if weights is None:
                state = timm.create_model(model, pretrained=True, num_classes=0).state_dict()
            elif weights.suffix == ".safetensors":
                from safetensors.torch import load_file

                state = load_file(weights)
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            state.pop("mask_token", None)
            state["pos_embed"] = _positions(state["pos_embed"], 16)
            network: Any = timm.create_model(model, num_classes=0, img_size=224)
            network.load_state_dict(state)
        except (
            Exception
        ) as error:  # the hub's client, damaged pickles and other networks raise nearly anything
            given = (
                f"{weights} cannot be used"
                if weights
                else "DINOv2's weights are neither cached nor to be had"
            )
            hint = "give dinov2_vitl14_pretrain.pth or timm's file with --weights (beside Inception: --dinov2-weights)"
            raise MsmdiffError(f"{given} as {model} ({_short(error)}): {hint}") from None
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(state[key].float().numpy().tobytes())
        self.name, self.width = (
            f"{model.partition('.')[0]}/{digest.hexdigest()[:8]}",
            network.num_features,
        )
        self.title = "FD-DINOv2" if model == DINOV2 else f"Fréchet distance over {model}"
        self.device, self._network = torch.device(device), network.to(device).eval()
        self._mean, self._deviation = torch.tensor(
            [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device
        ).view(2, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        x = (clean(images.to(self.device), 224) / 255 - self._mean) / self._deviation
        return self._network.forward_features(x)[:, 0].float(), None


def _positions(table: Tensor, side: int) -> Tensor:
    """DINOv2's own change of its position table [1, 1 + M^2, D] to another side: bicubic, with its
    offset of 0.1.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    image = table[:, 1:].float().unflatten(1, (old, old)).movedim(3, 1)
    image = F.interpolate(image, scale_factor=((side + 0.1) / old,) * 2, mode="bicubic")
    return torch.cat([table[:, :1], image.flatten(2).mT], 1)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _published_weights() -> Path:
    """pytorch-fid's file in MSMDIFF_CACHE or torch hub's cache, downloaded to the latter when it is
    in neither.
    """
    hub, ours = (
        Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE,
        cache_folder() / INCEPTION_FILE,
    )
    if not ours.is_file() and not hub.is_file():
        from pytorch_fid.inception import FID_WEIGHTS_URL

        try:
            hub.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(hub), hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise MsmdiffError(
                f"Inception weights are neither at {ours} nor at {hub}, nor can they be "
                f"downloaded ({error}): get "
                f"{INCEPTION_FILE} (sha256 {INCEPTION_SHA256}...) from pytorch-fid's releases and "
                "pass it with "
                "--weights FILE, or compare with --features pixel"
            ) from None
    return ours if ours.is_file() else hub


def build(
    kind: str,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    resize: str | None = None,
    precision: str = "fp32",
    metrics: set[str] = frozenset(),  # type: ignore[assignment]
) -> Features:
    """The `inception`, `dinov2` or `pixel` features that `metrics` need; UsageError for a setting
    they do not have.
    """
    if kind == "inception":
        return InceptionFeatures(
            weights, device, resize or "pytorch-fid", precision, "sfid" in metrics
        )
    if kind == "pixel" and weights is not None:
        raise UsageError(f"--weights {weights}: pixel features have no weights")
    if resize or precision != "fp32" or metrics & {"sfid", "is"}:
        raise UsageError(
            f"sfid, is, --resize and --precision are for --features inception, not {kind}"
        )
    return DinoFeatures(weights, device) if kind == "dinov2" else PixelFeatures(device)
