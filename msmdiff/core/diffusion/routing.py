"""The routes that a training pass can take: where the tokens that a mask keeps go in and out.

A new one is a class here or in a plugin, registered with its options: made of the `mask` section,
the mask and the network, it draws a `Route` for every batch.
"""

from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core.backbones.routes import Route
from msmdiff.core.diffusion.masking import Mask, mdt_kept
from msmdiff.core.diffusion.time_sampling import Draw
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import MaskConfig


class DrawsRoutes(Protocol):
    """What is registered: `fill` is what stands in the gaps, which not every network has."""

    fill: str

    def draw(self, batch: int, draw: Draw) -> Route | None:
        """The route of one pass over `batch` images; None where nothing is hidden."""


@register("route", "visible")
class Visible:
    """Kept tokens only, from the patch embedding to the output (masked score matching)."""

    fill: ClassVar = "none"

    def __init__(self, section: MaskConfig, mask: Mask, network: Any) -> None:
        self.mask = mask

    def draw(self, batch: int, draw: Draw) -> Route | None:
        keep = self.mask.draw(batch, draw("mask"))
        return None if keep is None else Route(keep)


class SideOptions(Options):
    spread: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="random extra share hidden per step, from 0 to this; null: as published",
    )


@register("route", "side", SideOptions)
class Side:
    """Kept tokens through MDT's encoder, the side-interpolater in the gaps, all through the
    decoder.
    """

    fill: ClassVar = "side"

    def __init__(
        self, section: MaskConfig, mask: Mask, network: Any, *, spread: float | None
    ) -> None:
        self.ratio, self.spread, self.tokens = section.ratio, spread or 0.0, mask.tokens
        self.leave = network.encoder_depth

    def draw(self, batch: int, draw: Draw) -> Route:
        extra = None
        if self.spread:
            generator = draw("ratio", "cpu")
            extra = torch.rand((), generator=generator, device="cpu").item()
        kept = mdt_kept(self.tokens, self.ratio, extra, self.spread)
        generator = draw("mask")
        noise = torch.rand(batch, self.tokens, generator=generator, device=generator.device)
        keep: Tensor = noise.argsort(dim=1)[:, :kept]
        return Route(keep=keep, enter=0, leave=self.leave, fill="side", scored="all")


class TreadOptions(Options):
    enter: int = Field(2, ge=0, description="block before which hidden tokens leave")
    leave: int = Field(
        4, ge=0, description="blocks before the end where they come back; long skips may ask others"
    )


@register("route", "tread", TreadOptions)
class Tread:
    """Hidden tokens skip the blocks in between and come back as they were (TREAD)."""

    fill: ClassVar[Literal["own"]] = "own"

    def __init__(
        self, section: MaskConfig, mask: Mask, network: Any, *, enter: int, leave: int
    ) -> None:
        self.mask, self.enter = mask, enter
        self.leave = network.trunk.symmetric_leave(enter, leave)
        depth = network.trunk.depth
        if not enter < self.leave <= depth:
            raise UsageError(
                f"mask.enter {enter} and mask.leave {leave} leave no block between them in a "
                f"network of {depth}: lower them, for example to 1"
            )

    def draw(self, batch: int, draw: Draw) -> Route | None:
        keep = self.mask.draw(batch, draw("mask"))
        return (
            None
            if keep is None
            else Route(keep=keep, enter=self.enter, leave=self.leave, fill="own", scored="all")
        )
