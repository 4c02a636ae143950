"""What images are compared by: Inception's features, DINOv2's, or plain pixels for tiny images and
offline use.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError
from torch import Tensor, nn

from msmdiff.core import files, hub, registry, tensor_files
from msmdiff.core.data.loader import cache_folder
from msmdiff.core.diffusion.codecs import to_unit
from msmdiff.core.errors import MsmdiffError, UsageError, nearest
from msmdiff.core.registry import Options, register

INCEPTION_FILE, INCEPTION_SHA256 = "pt_inception-2015-12-05-6726825d.pth", "6726825d"
"""The published file, and how its sha256 begins."""
DINOV2 = "vit_large_patch14_dinov2.lvd142m"


class Features:
    """Maps images to vectors of `width`, and where `spatial_width` is not 0 to the second ones that
    sFID takes.

    `name` tells what was computed, weights included; `metric` and `title` are what a Fréchet
    distance over it is called by scripts and by people, and `suffix` follows other metrics' names.
    `resize` is the rule by which images are brought to the network's size.
    """

    prefix: ClassVar[str] = ""
    """How `name` begins, by which statistics are known."""
    offers: ClassVar[frozenset[str]] = frozenset()
    """What there is beside vectors: `spatial` ones, `classes`."""

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

    @classmethod
    def titles(cls, name: str) -> tuple[str, str]:
        """`title` and `suffix` of the features that statistics call `name`."""
        return cls.title, cls.suffix

    def settings(self) -> dict[str, str]:
        """What statistics must share to be compared."""
        return {"features": self.name, "resize": self.resize, "precision": self.precision}


@register("features", "pixel")
class PixelFeatures(Features):
    """The image averaged over an 8x8 grid of areas, in -1..1: 192 numbers. Not FID."""

    prefix = "pixel-"

    name, width, resize = "pixel-8x8", 192, "area"
    metric, title, suffix = "fd_pixel", "pixel Fréchet distance", " over pixels"

    def __init__(
        self,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        spatial: bool = False,
    ) -> None:
        if weights is not None:
            raise UsageError(f"--weights {weights}: pixel features have no weights")
        self.device = torch.device(device)

    def __call__(self, images: Tensor) -> tuple[Tensor, None]:
        if min(images.shape[-2:]) < 8:
            raise UsageError(
                "--features pixel needs images of at least 8x8 pixels, not "
                f"{list(images.shape[-2:])}"
            )
        return F.adaptive_avg_pool2d(to_unit(images), 8).flatten(1), None


def clean(images: Tensor, size: int) -> Tensor:
    """Pillow's antialiased bicubic in float, clipped (Parmar et al. 2022): [B, 3, H, W], 0..255."""
    return F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True).clamp(0, 255)


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
        "pytorch-fid", description="whose rule brings images to 299 pixels"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the network")


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


DINOV2_FILES = (
    "give dinov2_vitl14_pretrain.pth or timm's file with --weights (beside Inception: "
    "--dinov2-weights)"
)


@register("features", "dinov2")
class DinoFeatures(Features):
    """DINOv2's class token after the last norm, of images brought to 224 by the clean rule (Stein
    et al. 2023).

    Args:
        weights: the published file, or timm's; None takes timm's from the hub or its cache.
        model: timm's name; published distances are of ViT-L/14.

    Raises MsmdiffError when no weights can be had, or they are another network's.
    """

    prefix = DINOV2.partition(".")[0]
    resize, metric, suffix = "clean", "fd_dinov2", " over DINOv2"

    def __init__(
        self,
        weights: Path | None = None,
        device: torch.device | str = "cpu",
        *,
        spatial: bool = False,
        model: str = DINOV2,
    ) -> None:
        import timm

        try:
            if weights is None:
                with hub.loading(model, "DINOv2's weights", DINOV2_FILES):
                    made = timm.create_model(model, pretrained=True, num_classes=0)
                state = made.state_dict()
            else:
                state = tensor_files.read(weights)
            state.pop("mask_token", None)
            state["pos_embed"] = _positions(state["pos_embed"], 16)
            network: Any = timm.create_model(model, num_classes=0, img_size=224)
            network.load_state_dict(state)
        except hub.OutOfReach:
            raise
        except (
            Exception
        ) as error:  # the hub's client, damaged pickles and other networks raise nearly anything
            given = (
                f"{weights} cannot be used"
                if weights
                else "DINOv2's weights are neither cached nor to be had"
            )
            raise MsmdiffError(f"{given} as {model} ({_short(error)}): {DINOV2_FILES}") from None
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

    @classmethod
    def titles(cls, name: str) -> tuple[str, str]:
        model = name.rpartition("/")[0]
        return (
            "FD-DINOv2" if model == cls.prefix else f"Fréchet distance over {model}"
        ), cls.suffix


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
    theirs, ours = (
        Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE,
        cache_folder() / INCEPTION_FILE,
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


def build(
    kind: str,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    *,
    needs: frozenset[str] = frozenset(),
    **options: Any,
) -> Features:
    """The feature network of a name, with what metrics need of it: `spatial` features, `classes`.

    Raises UsageError for what it does not have, and for an option that it does not take.
    """
    entry, complete = _asked(kind, needs, options)
    return entry.make(weights, device, spatial="spatial" in needs, **complete)


def recorded(
    kind: str,
    known: Mapping[str, str],
    widths: tuple[int, int],
    device: torch.device | str = "cpu",
    *,
    needs: frozenset[str] = frozenset(),
    **options: Any,
) -> Features:
    """What is known of the features that statistics are of, without the network, whose weights are
    not looked for.

    `known` are the statistics' settings, `widths` those of the features and of the spatial ones.
    Raises what `build` raises.
    """
    entry, complete = _asked(kind, needs, options)
    made = Features()
    made.name = known["features"]
    made.title, made.suffix = entry.make.titles(made.name)
    made.metric, made.width = entry.make.metric, widths[0]
    made.resize = known.get("resize", complete.get("resize", ""))
    made.precision = known.get("precision", complete.get("precision", made.precision))
    made.spatial_width = widths[1] if "spatial" in needs else 0
    made.device = torch.device(device)
    return made


def _asked(
    kind: str, needs: frozenset[str], options: Mapping[str, Any]
) -> tuple[registry.Entry, dict[str, Any]]:
    """A feature network's entry and its options, complete; raises UsageError as `build` says."""
    entry = registry.find("features", kind, "--features")
    given = {name: value for name, value in options.items() if value is not None}
    if missing := needs - entry.make.offers:
        raise UsageError(
            f"sfid and is are for --features inception: {kind} has no {', '.join(sorted(missing))}"
        )
    if foreign := set(given) - set(entry.options.model_fields):
        name = min(foreign)
        near = nearest(name, list(entry.options.model_fields))
        raise UsageError(
            f"features.{name} = {given[name]} has no effect on --features {kind}{near}"
        )
    return entry, validated(entry, given, "features")


def validated(entry: registry.Entry, given: Mapping[str, Any], section: str) -> dict[str, Any]:
    """An entry's options, complete. Raises UsageError for a wrong value."""
    try:
        return entry.options(**given).model_dump()
    except ValidationError as error:
        problems = [
            f"{section}.{problem['loc'][0]} = {problem['input']!r}: {problem['msg'].lower()}"
            for problem in error.errors()
        ]
        raise UsageError("; ".join(problems)) from None


def kind_of(name: str) -> str | None:
    """The registered name of the network whose features are called `name` in statistics."""
    for entry in registry.entries("features").values():
        if entry.make.prefix and name.startswith(entry.make.prefix):
            return entry.name
    return None
