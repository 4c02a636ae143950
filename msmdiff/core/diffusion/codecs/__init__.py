"""The spaces diffusion runs in: codecs map uint8 images to about unit-scale tensors, and back.

The road of an image: `pack` once, offline; `encode` every step, on the device; `decode` after
sampling. A codec says itself whatever is asked of it; a new one is one file here or in a plugin.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.errors import MsmdiffError
from msmdiff.core.sections import CodecConfig


class Codec(ABC):
    """A space.

    Attributes:
        shape: (C, H, W) that the backbone sees.
        factor: pixels per position, along a side.
        packs: what a packed data set holds: `pixel` uint8 images, or the name of the codec whose
            `pack` made it.
        bounded: whether x0 lies in -1..1, to which `sample.threshold` scales it.
        measures: the options that may be measured of the data, where they are not given.
        network: what decodes, once it is loaded; None where there is none.
    """

    shape: tuple[int, int, int]
    factor: int = 1
    packs: ClassVar[str] = "pixel"
    bounded: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ()
    network: Any = None

    @classmethod
    def factor_of(cls, options: dict[str, Any]) -> int:
        """`factor` for given options, before anything is built."""
        return 1

    @classmethod  # noqa: B027
    def complete(cls, section: Any, identity: dict[str, Any]) -> None:
        """Fill in what the identity of a packed set tells of the `codec` section."""

    @classmethod
    def fits(cls, section: Any, image_size: int, entry: tuple[int, ...]) -> dict[str, Any]:
        """What a packed set with entries of this shape asks of a configuration: key -> (what it
        has, what it needs).
        """
        return {}

    def load(self, device: torch.device | str = "cpu") -> None:  # noqa: B027
        """Load what encoding and decoding need, before anything costly is done.

        Raises MsmdiffError or UsageError where it cannot be had.
        """

    def pack(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> what a data set stores."""
        return images

    @abstractmethod
    def encode(self, packed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is stored -> x0 float32 [B, *shape], about unit scale."""

    @abstractmethod
    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        """z [B, *shape] -> uint8 images [B, 3, H, W]."""

    def unrounded(self, z: Tensor) -> Tensor:
        """z [B, *shape] -> images [B, 3, H, W] of about -1..1, which nothing has looked at: where a
        decoder runs in every step, and a GPU must not be waited for.
        """
        return to_unit(self.decode(z))

    def sketch(self) -> "Codec":
        """The same codec, whose network, if it has one, lies on the meta device: to count with,
        before anything is loaded.
        """
        return self

    def clip(self, x0: Tensor) -> Tensor:
        """Bring x0 [B, *shape] into the range that images can have; used at every sampling step."""
        return x0

    def measure(self, batches: Iterable[Tensor]) -> dict[str, Any]:
        """The values of the options in `measures`, of uint8 batches [B, 3, H, W]."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What made a packed set: sets of another identity are not read as the same."""
        return {"name": self.packs}

    def describe(self) -> str:
        """For people, in a few words."""
        return self.packs

    def example(self, batch: int, device: torch.device | str) -> Tensor:
        """A random packed batch, as training reads it: to time with."""
        side = self.shape[-1] * self.factor
        return torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=device)


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(x: Tensor, rounding: str = "half_even", *, checked: bool = True) -> Tensor:
    """-1..1 -> uint8 0..255, clamped; `half_even`, `half_up` (DiT, U-ViT, MaskDM) or `truncate`
    (MDT).

    Raises MsmdiffError for numbers that are not finite: as uint8, NaN would be black. Looking for
    them waits for a GPU, and without `checked` nobody does.
    """
    x = x.float()
    if checked and not x.isfinite().all():
        raise MsmdiffError(
            "decoding gave numbers that are not finite: try fp32 (sample.precision, "
            "codec.precision), or another codec.vae"
        )
    x = x.add(1).mul(127.5)
    if rounding != "truncate":
        x = x.round() if rounding == "half_even" else x.add(0.5).floor()
    return x.clamp(0, 255).to(torch.uint8)


def build(config: CodecConfig, image_size: int) -> Codec:
    """The codec a configuration asks for, for square images of `image_size` pixels."""
    entry = registry.find("codec", config.name, "codec.name")
    return entry.make(image_size, **entry.takes(config))


def open_measures(config: CodecConfig, codec: Codec) -> list[str]:
    """The options that are still to be measured of the data."""
    return [name for name in codec.measures if getattr(config, name) is None]
