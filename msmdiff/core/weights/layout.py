"""What the maps of the published layouts have in common: reading shapes, renaming, and reshaping
patch kernels.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from msmdiff.core.errors import MsmdiffError, UsageError

Tensors = dict[str, Tensor]
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Network:
    """A network as its tensors describe it: our family, its input (C, H, W), its classes, its
    constructor's fields.
    """

    family: str
    shape: tuple[int, int, int]
    num_classes: int
    fields: dict[str, Any] = field(default_factory=dict)


def rename(tensors: Mapping[str, Tensor], pairs: Pairs) -> Tensors:
    """Rename keys by (old, new) pairs: the first that the key starts with, then every pair that
    begins with a dot.
    """

    def renamed(name: str) -> str:
        for old, new in pairs:
            if not old.startswith(".") and name.startswith(old):
                name = new + name[len(old) :]
                break
        for old, new in pairs:
            if old.startswith("."):
                name = name.replace(old, new)
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}


def reverse(pairs: Pairs) -> Pairs:
    return [(new, old) for old, new in pairs]


def kernel_to_linear(kernel: Tensor) -> Tensor:
    """A patch convolution's [D, C, p, p] as the weight of a Linear on patch vectors, [D, p*p*C]."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def linear_to_kernel(weight: Tensor, patch: int) -> Tensor:
    """The inverse of `kernel_to_linear`."""
    return weight.view(len(weight), patch, patch, -1).permute(0, 3, 1, 2).contiguous()


def count(names: Iterable[str], prefix: str) -> int:
    """How many numbered modules `prefix0.`, `prefix1.`, ... there are."""
    numbers = {name[len(prefix) :].split(".", 1)[0] for name in names if name.startswith(prefix)}
    return len(numbers)


def side_of(tokens: float, what: str) -> int:
    """The side of a square grid of so many tokens. Raises MsmdiffError when it is none."""
    side = math.isqrt(round(tokens)) if tokens >= 1 else 0
    if side == 0 or side * side != tokens:
        raise MsmdiffError(f"{what} gives {tokens:g} patch tokens, which is not a square grid")
    return side


def mlp_ratio(inner: Mapping[int, int]) -> float:
    """The ratio from which a constructor computes int(width * ratio) = inner[width], of few digits
    where there is one.

    Raises MsmdiffError where no ratio gives all.
    """
    low, high = (
        max(n / width for width, n in inner.items()),
        min((n + 1) / width for width, n in inner.items()),
    )
    for ratio in (low, *(round((low + high) / 2, digits) for digits in range(16))):
        if all(int(width * ratio) == n for width, n in inner.items()):
            return ratio
    raise MsmdiffError(
        f"no one MLP ratio gives the inner widths {list(inner.values())} at {list(inner)}"
    )


def heads(
    given: Mapping[str, Any], sizes: Iterable[Mapping[str, Any]], width: int, depth: int, odd: bool
) -> int:
    """Attention heads, which shapes do not tell: as given, else those of the published sizes of
    this width and depth.

    `odd`: depths 2k and 2k + 1 are the same network. Raises UsageError when neither says.
    """
    if "num_heads" in given:
        return int(given["num_heads"])
    group = 2 if odd else 1
    known = {
        s["num_heads"]
        for s in sizes
        if s["hidden_size"] == width and s["depth"] // group == depth // group
    }
    if len(known) != 1:
        raise UsageError(
            "the number of attention heads cannot be read from shapes, and no published size has "
            f"width {width} and "
            f"depth {depth}: give it with --set model.num_heads=... (a divisor of {width})"
        )
    return known.pop()


IMAGENET_CLASSES = 1000


def has_null_class(given: Mapping[str, Any], rows: int) -> bool:
    """Whether the last row of a label table is the null class: as given, or else unless there are
    1000 rows.

    U-ViT's ImageNet-64 models were published without one.
    """
    return bool(given.get("null_class", rows != IMAGENET_CLASSES))


def no_label_dropout(network: Network) -> dict[str, Any]:
    """The part of the configuration that follows from having no null class."""
    return (
        {"objective": {"label_dropout": 0.0}} if network.fields.get("null_class") is False else {}
    )


PIXELS, STABLE_DIFFUSION = 3, 4
"""Channels of images, and of Stable Diffusion's latents."""


def latent_sections(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Configuration of data and codec: three channels are pixels, others are latents of an
    autoencoder, four of them Stable Diffusion's.

    Of another autoencoder its scale and its factor are not known here: they are the user's to set.
    Raises MsmdiffError for one channel, which no codec makes.
    """
    channels, _, side = shape
    if channels == 1:
        raise MsmdiffError("its images have one channel, and this tool's have three")
    if channels == PIXELS:
        return {"data": {"image_size": side}, "codec": {"name": "pixel"}}
    codec = {"name": "vae"} | ({} if channels == STABLE_DIFFUSION else {"channels": channels})
    return {"data": {"image_size": 8 * side}, "codec": codec}
