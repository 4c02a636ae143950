"""Pixels in -1..1."""

import torch
from torch import Tensor

from msmdiff.core.diffusion.codecs import Codec, to_uint8, to_unit
from msmdiff.core.registry import register


@register("codec", "pixel")
class PixelCodec(Codec):
    """Pixels in -1..1."""

    bounded = True

    def __init__(self, image_size: int) -> None:
        self.shape = (3, image_size, image_size)

    def encode(self, packed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return to_unit(packed)

    def decode(self, z: Tensor, rounding: str = "half_even") -> Tensor:
        return to_uint8(z, rounding)

    def unrounded(self, z: Tensor) -> Tensor:
        return z

    def clip(self, x0: Tensor) -> Tensor:
        return x0.clamp(-1, 1)
