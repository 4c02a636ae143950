"""What images are compared by: vectors of each image. Plain pixels are here, for tiny images and
offline use; `inception`, `dinov2` and `classifier` have the networks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.diffusion.codecs import to_unit
from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.registry import register


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


def one_line(error: Exception) -> str:
    """What a library says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def named(kind: str, weights: Path | None) -> tuple[str, Path | None]:
    """A feature network and its weights as users may write them: the file of a classifier in the
    network's place.

    Raises UsageError for two files.
    """
    if not kind.endswith(".safetensors"):
        return kind, weights
    if weights is not None:
        raise UsageError(
            f"features {kind} is a classifier's file, and weights {weights} another: give one"
        )
    return "classifier", Path(kind)


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
