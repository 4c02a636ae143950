"""The routes that a training pass can take: where the tokens that a mask keeps go in and out.

A new one is a class here or in a plugin, registered with its options: made of the `mask` section,
the mask and the network, it draws a `Route` for every batch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.backbones.layers import patchify
from msmdiff.core.backbones.routes import Route, Trunk
from msmdiff.core.diffusion.masking import Mask, PatchMask, mdt_kept
from msmdiff.core.diffusion.process import Noise
from msmdiff.core.diffusion.time_sampling import Draw
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import MaskConfig, SampleConfig


class DrawsRoutes(Protocol):
    """What is registered.

    Attributes:
        fill: what stands in the gaps, which not every network has.
        scored: where the loss counts, as `Route` has it; without it, on the kept tokens of routes
            that leave gaps empty.
        sparse: the part that the network needs for it (`model.sparse`), if any; a class attribute
            that may be left out.
        copies: passes over each image, each with other tokens; may be left out too.
    """

    fill: str

    def draw(self, batch: int, draw: Draw) -> Route | None:
        """The route of one pass over `batch` images; None where nothing is hidden."""


@register("route", "visible")
class Visible:
    """Kept tokens only, from the patch embedding to the output (masked score matching)."""

    fill: ClassVar = "none"
    scored: ClassVar[Literal["kept", "all"]] = "kept"

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
        description="MDT: random extra share hidden per step, from 0 to this; null follows the "
        "paper.",
    )


@register("route", "side", SideOptions)
class Side:
    """Kept tokens through MDT's encoder, the side-interpolater in the gaps, all through the
    decoder.
    """

    fill: ClassVar = "side"
    scored: ClassVar[Literal["kept", "all"]] = "all"

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
        return Route(keep=keep, enter=0, leave=self.leave, fill="side", scored=self.scored)


class TreadOptions(Options):
    enter: int = Field(2, ge=0, description="The block before which hidden tokens leave.")
    leave: int = Field(
        4,
        ge=0,
        description="The number of blocks before the end at which they come back; long skips may "
        "ask for another.",
    )


@register("route", "tread", TreadOptions)
class Tread:
    """Hidden tokens skip the blocks in between and come back as they were (TREAD)."""

    fill: ClassVar[Literal["own"]] = "own"
    scored: ClassVar[Literal["kept", "all"]] = "all"

    def __init__(
        self, section: MaskConfig, mask: Mask, network: Any, *, enter: int, leave: int
    ) -> None:
        self.mask, self.enter = mask, enter
        self.leave = network.trunk.symmetric_leave(enter, leave)
        depth = network.trunk.depth
        if not enter < self.leave <= depth:
            raise UsageError(
                f"mask.enter {enter} and mask.leave {leave} leave no block between them in a "
                f"network of {depth}: {_room(network.trunk, enter, leave)}"
            )
        network.trunk.check_values(enter, self.leave)

    def draw(self, batch: int, draw: Draw) -> Route | None:
        keep = self.mask.draw(batch, draw("mask"))
        return (
            None
            if keep is None
            else Route(
                keep=keep, enter=self.enter, leave=self.leave, fill="own", scored=self.scored
            )
        )


def _room(trunk: Trunk, enter: int, leave: int) -> str:
    """What would fit instead of a route that does not, nearest to it."""
    for shorter in range(min(leave, trunk.depth), -1, -1):
        for earlier in range(min(enter, trunk.depth), -1, -1):
            end = trunk.symmetric_leave(earlier, shorter)
            if earlier < end <= trunk.depth:
                return f"use mask.enter {earlier} and mask.leave {shorter}"
    return "no such route fits, use another mask.route"


class SprintOptions(Options):
    path_drop: float = Field(
        0.1, ge=0, lt=1, description="The share of images for which the sparse blocks say nothing."
    )


@register("route", "sprint", SprintOptions)
class Sprint:
    """All tokens through the first and last blocks, kept ones through the middle, then both fused
    (SPRINT). Needs model.sparse fusion.
    """

    fill: ClassVar = "mask"
    scored: ClassVar[Literal["kept", "all"]] = "all"
    sparse: ClassVar = "fusion"

    def __init__(self, section: MaskConfig, mask: Mask, network: Any, *, path_drop: float) -> None:
        self.mask, self.path_drop = mask, path_drop
        self.enter, self.leave = network.trunk.meets

    def draw(self, batch: int, draw: Draw) -> Route:
        generator = draw("path")
        chance = torch.rand(batch, generator=generator, device=generator.device)
        return Route(
            keep=self.mask.draw(batch, draw("mask")),
            enter=self.enter,
            leave=self.leave,
            fill="mask",
            scored=self.scored,
            dropped=chance < self.path_drop,
        )


@register("route", "maskdit")
class MaskDit:
    """Kept tokens through the blocks, all through a light decoder, mask tokens in the gaps
    (MaskDiT). Needs model.sparse decoder; the loss counts on the kept ones.
    """

    fill: ClassVar = "mask"
    scored: ClassVar[Literal["kept", "all"]] = "kept"
    sparse: ClassVar = "decoder"

    def __init__(self, section: MaskConfig, mask: Mask, network: Any) -> None:
        self.mask = mask

    def draw(self, batch: int, draw: Draw) -> Route | None:
        keep = self.mask.draw(batch, draw("mask"))
        return None if keep is None else Route(keep=keep, fill="mask", scored=self.scored)


@register("route", "deferred")
class Deferred(Visible):
    """All tokens through a light mixer, kept ones through all blocks (deferred masking). Needs
    model.sparse mixer.
    """

    sparse: ClassVar = "mixer"


class SeparateOptions(Options):
    groups: int | None = Field(
        None,
        ge=1,
        description="The number of disjoint masks of each image in a step; null takes as many as "
        "fit.",
    )


@register("route", "separate", SeparateOptions)
class Separate:
    """Several disjoint sets of visible tokens of the same image in one step, each with its own time
    and noise: the data side gets as many times cheaper (separation).
    """

    fill: ClassVar = "none"
    scored: ClassVar[Literal["kept", "all"]] = "kept"

    def __init__(
        self, section: MaskConfig, mask: Mask, network: Any, *, groups: int | None
    ) -> None:
        self.tokens, self.kept = mask.tokens, mask.kept
        self.copies = groups or mask.tokens // mask.kept
        if section.kind != "patch":
            raise UsageError(
                f"mask.route separate divides single tokens: mask.kind must be patch, not "
                f"{section.kind}"
            )
        if self.copies * mask.kept > mask.tokens:
            raise UsageError(
                f"mask.groups {self.copies} of {mask.kept} tokens each are more than the "
                f"{mask.tokens} there are: at most {mask.tokens // mask.kept}"
            )

    def draw(self, batch: int, draw: Draw) -> Route | None:
        """`batch` counts every copy; those of one image follow each other."""
        if self.kept == self.tokens:
            return None
        generator = draw("mask")
        images = -(-batch // self.copies)
        noise = torch.rand(images, self.tokens, generator=generator, device=generator.device)
        order = noise.argsort(dim=1)[:, : self.copies * self.kept]
        return Route(order.reshape(-1, self.kept)[:batch].sort(dim=1).values)


# ------------------------------------------------------------------ a weaker pass, for guidance


def weak_route(
    options: SampleConfig, mask: MaskConfig, network: Any, noise: Noise
) -> Callable[[], Route] | None:
    """What draws the route of the weaker pass that `sample.cfg_against` asks for; None: there is no
    such pass.

    Args:
        mask: that of the training: its route, where it has one that gives whole images; else
            SPRINT's or TREAD's, as the network has it.
        noise: [B, C, H, W] of every image's own; its order tells which tokens are kept, so that a
            seed stays one image.

    Raises UsageError for a network that cannot do it.
    """
    if options.cfg_against == "null" or options.cfg_scale == 1:
        return None
    fusion = getattr(network, "fusion", None) is not None
    if options.cfg_against == "path":
        if not fusion:
            raise UsageError(
                "sample.cfg_against path needs a network with model.sparse fusion (SPRINT): use "
                "null or route"
            )
        return lambda: Route(fill="mask", scored="all", dropped=True)
    given = registry.entries("route").get(mask.route)
    trained = given is not None and given.make.fill in ("own", "mask")
    name = mask.route if trained else ("sprint" if fusion else "tread")
    entry = registry.find("route", name, "mask.route")
    own = entry.takes(mask) if trained else entry.options().model_dump()
    if entry.make.fill == "own" and "own" not in network.fills:
        raise UsageError(
            "sample.cfg_against route: this network knows no route of fewer tokens that gives "
            "whole images: use null"
        )
    hiding = PatchMask(network.grid, options.cfg_hidden)
    way = entry.make(mask, hiding, network, **own)
    generator = torch.Generator()
    drawn = way.draw(1, lambda *_: generator)

    def draw() -> Route:
        order = patchify(noise(), network.patch_size).sum(dim=-1).argsort(dim=1)
        return replace(drawn, keep=order[:, : hiding.kept].sort(dim=1).values, dropped=False)

    return draw
