"""MaskDM's wavelet network (Lei et al. 2023): a U-ViT over two groups of tokens, approximation and
detail.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msmdiff.core.backbones.family import family
from msmdiff.core.backbones.layers import gather_tokens, patchify, unpatchify
from msmdiff.core.backbones.routes import Route
from msmdiff.core.backbones.uvit import UViT
from msmdiff.core.errors import UsageError

SIZES: dict[str, dict] = {
    "MaskDM-DWT-L/4": dict(patch_size=4, hidden_size=1024, depth=16, num_heads=16, qkv_bias=True),
}


@dataclass
class PairRoute(Route):
    """Ids of approximation (`keep`) and of detail [B, K'], which need not be the same."""

    detail: Tensor | None = None


@family("maskdwt", SIZES)
class MaskDWT(UViT):
    """The first three channels (approximation) and the others (detail) have patches, tokens and
    outputs of their own.

    Args: as `UViT`, and
        detail_scale: side of a detail patch over that of an approximation patch.

    Masked, it takes either one route for both groups, and returns [B, K, p*p*C] in `patchify`'s
    order (where detail_scale is 1), or a `PairRoute`, and returns a pair of patch vectors.
    """

    fills: ClassVar = frozenset({"none"})

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        detail_scale: int = 1,
    ) -> None:
        channels, height, width = shape
        side = patch_size * detail_scale
        if channels <= 3 or height % side or width % side:
            raise UsageError(
                f"a wavelet network needs more than 3 channels and sides that divide by {side} "
                "(model.patch_size x "
                f"model.detail_scale), not a {channels}x{height}x{width} input: use codec.name=dwt"
            )
        self.detail_patch = side
        self.detail_grid = (height // side, width // side)
        super().__init__(
            shape,
            num_classes,
            patch_size=patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            mlp_time_embed=mlp_time_embed,
        )
        self.grids = [self.grid, self.detail_grid]

    def _patch_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.detail_grid[0] * self.detail_grid[1]

    def _make_patch_embed(self, channels: int) -> nn.Module:
        approx, detail = 3 * self.patch_size**2, (channels - 3) * self.detail_patch**2
        return nn.ModuleDict(
            {
                "approx": nn.Linear(approx, self.hidden_size),
                "detail": nn.Linear(detail, self.hidden_size),
            }
        )

    def _make_to_output(self, channels: int) -> nn.Module:
        approx, detail = 3 * self.patch_size**2, (channels - 3) * self.detail_patch**2
        return nn.ModuleDict(
            {
                "approx": nn.Linear(self.hidden_size, approx),
                "detail": nn.Linear(self.hidden_size, detail),
            }
        )

    def _embed(self, x: Tensor, position: Tensor, route: Route | None) -> Tensor:
        first = self.grid[0] * self.grid[1]
        groups = (
            (self.patch_embed["approx"], patchify(x[:, :3], self.patch_size), position[:, :first]),
            (
                self.patch_embed["detail"],
                patchify(x[:, 3:], self.detail_patch),
                position[:, first:],
            ),
        )
        tokens = []
        for (embed, patches, where), ids in zip(groups, self._pair(route), strict=True):
            if ids is not None:
                patches, where = gather_tokens(patches, ids), gather_tokens(where, ids)
            tokens.append(embed(patches) + where)
        return torch.cat(tokens, dim=1)

    def _predict(self, tokens: Tensor, route: Route | None) -> Any:
        ids, _ = self._pair(route)
        first = self.grid[0] * self.grid[1] if ids is None else ids.shape[1]
        approx = self.to_output["approx"](tokens[:, :first])
        detail = self.to_output["detail"](tokens[:, first:])
        if ids is None:
            images = (
                unpatchify(approx, self.patch_size, self.grid),
                unpatchify(detail, self.detail_patch, self.detail_grid),
            )
            return torch.cat(images, dim=1)
        if isinstance(route, PairRoute):
            return approx, detail
        pixels = (out.unflatten(-1, (self.patch_size**2, -1)) for out in (approx, detail))
        return torch.cat(list(pixels), dim=-1).flatten(-2)

    def _pair(self, route: Route | None) -> tuple[Tensor | None, Tensor | None]:
        """The kept ids of approximation and of detail. Raises UsageError for what does not fit."""
        if route is None or route.keep is None:
            return None, None
        if not route.early:
            raise UsageError("a wavelet network drops tokens from the first block to the last")
        if isinstance(route, PairRoute):
            return route.keep, route.detail
        if self.grid != self.detail_grid:
            raise UsageError(
                "with model.detail_scale above 1 the two groups of tokens differ: one mask cannot "
                "hide both"
            )
        return route.keep, route.keep
