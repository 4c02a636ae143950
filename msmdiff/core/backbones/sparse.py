"""What a network made for sparse training has beside its blocks: a mixer before them (deferred
masking), a fusion around them (SPRINT), or a light decoder behind them (MaskDiT).

Each lets a route hide tokens that the loss still counts, or that others have heard of. They are
part of the network: unmasked passes go through them too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from msmdiff.core.backbones.layers import sincos_table
from msmdiff.core.backbones.routes import Route, Trunk
from msmdiff.core.errors import UsageError

Sparse = Literal["none", "mixer", "fusion", "decoder"]

RunBlock = Callable[[nn.Module, Tensor], Tensor]
"""(block, tokens) -> tokens, under the network's condition."""


@dataclass
class Light:
    """The light blocks of a mixer or a decoder.

    Attributes:
        width, num_heads, depth: of these blocks, not of the network's own.
        block: makes one of (width, num_heads).
    """

    width: int
    num_heads: int
    depth: int
    block: Callable[[int, int], nn.Module]

    def made(self) -> nn.ModuleList:
        """The blocks. Raises UsageError for a width that does not suit the heads."""
        if self.width % self.num_heads or self.width % 4:
            raise UsageError(
                f"model.sparse_width {self.width} must divide by 4 and by the {self.num_heads} "
                "heads of model.sparse_heads"
            )
        return nn.ModuleList(self.block(self.width, self.num_heads) for _ in range(self.depth))


class Mixer(nn.Module):
    """All tokens through light blocks before any is hidden, so that the kept ones know of the
    others (deferred masking; Sehwag et al. 2024, "Stretching Each Dollar").
    """

    def __init__(self, width: int, light: Light) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, light.width))
        self.blocks = light.made()
        self.out = nn.Sequential(nn.LayerNorm(light.width), nn.Linear(light.width, width))

    def forward(self, tokens: Tensor, run: RunBlock) -> Tensor:
        """tokens [B, E + L, D] -> [B, E + L, D]."""
        mixed = self.into(tokens)
        for block in self.blocks:
            mixed = run(block, mixed)
        return self.out(mixed)


class Fusion(nn.Module):
    """The tokens from before the sparse blocks, fused with what comes out of these (SPRINT): hidden
    places bring a mask token, which is never trained.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width), requires_grad=False)
        self.linear = nn.Linear(2 * width, width)

    def forward(self, trunk: Trunk, before: Tensor, arrived: Tensor, route: Route) -> Tensor:
        """before [B, E + L, D], arrived [B, E + K or L, D] -> [B, E + L, D]."""
        blank = self.mask_token.to(arrived.dtype)
        middle = arrived
        if route.keep is not None:
            middle = trunk.own(blank.expand_as(before), arrived, route.keep)
        if route.dropped is True:
            middle = blank.expand_as(before)
        elif isinstance(route.dropped, Tensor):
            middle = torch.where(route.dropped[:, None, None], blank, middle)
        return self.linear(torch.cat([middle, before.to(middle.dtype)], dim=-1))


class Decoder(nn.Module):
    """Light blocks behind the network's own, which see all tokens: in hidden places a learned mask
    token (MaskDiT; Zheng et al. 2023).

    Args:
        into: norm and projection from the network's width to that of the light blocks.
    """

    def __init__(self, grid: tuple[int, int], light: Light, into: nn.Module) -> None:
        super().__init__()
        self.into = into
        self.mask_token = nn.Parameter(torch.zeros(1, 1, light.width))
        self.blocks = light.made()
        self.pos_embed = nn.Parameter(sincos_table(grid, light.width), requires_grad=False)

    def forward(self, trunk: Trunk, arrived: Tensor, route: Route, run: RunBlock) -> Tensor:
        """arrived [B, E + K or L, W], behind `into`, -> [B, E + L, W]."""
        tokens = arrived
        extras, patches = trunk.extras, self.pos_embed.shape[1]
        if route.keep is not None:
            blank = self.mask_token.to(arrived.dtype)
            everywhere = blank.expand(len(arrived), extras + patches, -1)
            tokens = trunk.own(everywhere, arrived, route.keep)
        position: Tensor = self.pos_embed
        if extras:
            position = torch.cat([position.new_zeros(1, extras, position.shape[-1]), position], 1)
        tokens = tokens + position.to(tokens.dtype)
        for block in self.blocks:
            tokens = run(block, tokens)
        return tokens


def attach(network: Any, kind: Sparse, light: Light, into: nn.Module | None) -> None:
    """Give a network the part of this kind, as `mixer`, `fusion` or `decoder` (the others are
    None), and tell its trunk.

    Args:
        into: a decoder's norm and projection to the light width.

    Raises UsageError for a fusion that leaves no block in between.
    """
    trunk, ends = network.trunk, light.depth
    network.mixer = network.fusion = network.decoder = None
    if kind == "mixer":
        network.mixer = Mixer(network.hidden_size, light)
        trunk.mixes = True
    elif kind == "fusion":
        trunk.meets = (ends, trunk.symmetric_leave(ends, ends))
        if trunk.meets[0] >= trunk.meets[1]:
            raise UsageError(
                f"model.sparse_depth {ends} at either end leaves no block in between in a network "
                f"of {trunk.depth}: lower it"
            )
        network.fusion = Fusion(network.hidden_size)
    elif kind == "decoder":
        assert into is not None
        trunk.meets = (0, trunk.depth)
        network.decoder = Decoder(network.grid, light, into)


def initialise(network: nn.Module) -> None:
    """Mask tokens ~ N(0, 0.02); everything else starts as the network's own layers do."""
    for module in network.modules():
        if isinstance(module, Fusion | Decoder):
            nn.init.normal_(module.mask_token, std=0.02)
