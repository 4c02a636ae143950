"""EDT (Chen et al. 2024, "EDT: An Efficient Diffusion Transformer Framework Inspired by Human-like
Sketching").
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from msmdiff.core.backbones.adaln import AdaLNTransformer, Amm, Block, check_width, modulate
from msmdiff.core.backbones.family import family
from msmdiff.core.backbones.layers import patchify, relative_index, sincos_table, unpatchify
from msmdiff.core.backbones.routes import Route, run_block
from msmdiff.core.errors import UsageError


def _size(hidden_size: int, depths: list[int], **more: bool) -> dict:
    widths = [hidden_size * share // 3 for share in (3, 4, 5, 4, 3)]
    heads = [width // 52 for width in widths]
    stages = dict(stage_widths=widths, stage_depths=depths, stage_heads=heads)
    return dict(
        patch_size=2, hidden_size=hidden_size, **stages, learn_sigma=True, amm="default", **more
    )


SIZES: dict[str, dict] = {
    "EDT-S/2": _size(312, [2, 2, 2, 3, 3]),
    "EDT-B/2": _size(624, [2, 2, 2, 3, 3]),
    "EDT-XL/2": _size(936, [6, 4, 4, 7, 7], mid_mask=True),
}


@dataclass
class TokenMasks(Route):
    """Tokens hidden during a training pass, boolean, True = hidden. The sequence keeps its length.

    down: before the first and second down-sampling, [B, L] and [B, L / 4].
    mid: before block 4 of the first stage, [B, L]; None where the network has no mask there.
    """

    scored: Literal["kept", "all"] = "all"
    down: tuple[Tensor | None, Tensor | None] = (None, None)
    mid: Tensor | None = None


# Bounds of the probability with which a token is hidden; one draw per pass and place (section 3.4).
MID_RANGE, DOWN_RANGES = (0.15, 0.25), ((0.4, 0.5), (0.1, 0.2))
MID_BLOCK = 4


class DownSample(nn.Module):
    """2x2 tokens become one: joined, modulated, hidden ones zeroed, projected, and placed on the
    new grid.
    """

    def __init__(
        self, width: int, new_width: int, condition: int, new_grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.grid = new_grid
        self.modulation = nn.Linear(condition, 8 * width)
        self.reduction = nn.Linear(4 * width, new_width, bias=False)
        self.pos_embed = nn.Parameter(sincos_table(new_grid, new_width), requires_grad=False)

    def forward(self, x: Tensor, c: Tensor, hidden: Tensor | None = None) -> Tensor:
        """x [B, L, D], c [B, C], hidden [B, L] or None -> [B, L / 4, D']."""
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        joined = modulate(self._join(x), shift, scale)
        if hidden is not None:
            visible = self._join(~hidden[..., None]).to(joined.dtype)  # [B, L / 4, 4]
            joined = (joined.unflatten(-1, (4, -1)) * visible[..., None]).flatten(-2)
        return self.reduction(joined) + self.pos_embed

    def _join(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L / 4, 4 D]: the neighbours' columns outside, their rows inside."""
        rows, columns = self.grid
        to_quarter = "b (rows r columns q) d -> b (rows columns) (q r d)"
        return rearrange(x, to_quarter, rows=rows, r=2, columns=columns, q=2)


class UpSample(nn.Module):
    """One token becomes 2x2."""

    def __init__(self, width: int, new_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.expand = nn.Linear(width, 4 * new_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, 4 L, D']."""
        rows, columns = self.grid
        to_four = "b (rows columns) (r q d) -> b (rows r columns q) d"
        return rearrange(self.expand(x), to_four, rows=rows, columns=columns, r=2, q=2)


class Fuse(nn.Module):
    """Joins a skip: concatenated, modulated by the condition, projected, and given its positions
    anew.
    """

    def __init__(self, width: int, condition: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition, 4 * width)
        self.cat = nn.Linear(2 * width, width)
        self.pos_embed = nn.Parameter(sincos_table(grid, width), requires_grad=False)

    def forward(self, x: Tensor, skip: Tensor, c: Tensor) -> Tensor:
        """x, skip [B, L, D], c [B, C] -> [B, L, D]."""
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        return self.cat(modulate(torch.cat([x, skip], dim=-1), shift, scale)) + self.pos_embed


@family("edt", SIZES)
class EDT(AdaLNTransformer):
    """Five stages on grids n, n/2, n/4, n/2, n, the last two joined with the inputs of the first
    two.

    Args:
        shape: (C, H, W) of the input; H and W must divide by 4 patch_size.
        num_classes: 0 is unconditional.
        patch_size: side of a patch.
        hidden_size: width of the condition and of the first stage.
        stage_widths: width of a token in each stage; the outer ones equal, and the ones inside
            them.
        stage_depths: blocks of each stage.
        stage_heads: attention heads of each stage.
        mlp_ratio: inner width of the MLP over the stage's.
        mid_mask: token masks also hide tokens before block 4 of the first stage (XL).
        learn_sigma: predict the variance too.
        null_class: the label table has one more row, the null class; the default of every published
            network.
        amm: blocks whose attention EDT's matrix modulates while sampling: off, default, or their
            numbers.
        amm_formula: the matrix, `exp`, or `cos` as at 512 pixels.

    Raises UsageError when the dimensions do not fit.
    """

    fills: ClassVar[frozenset[str]] = frozenset()
    published_objective: ClassVar = "edt"
    AMM: ClassVar = {12: [(0.0, [7, 10]), (2.0, [8])], 28: [(0.0, [23, 25]), (2.0, [24])]}

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        patch_size: int,
        hidden_size: int,
        stage_widths: list[int],
        stage_depths: list[int],
        stage_heads: list[int],
        mlp_ratio: float = 4.0,
        mid_mask: bool = False,
        learn_sigma: bool = False,
        null_class: bool = True,
        amm: Amm = "off",
        amm_formula: Literal["exp", "cos"] = "exp",
    ) -> None:
        stages = {"widths": stage_widths, "depths": stage_depths, "heads": stage_heads}
        _check_stages(stages, hidden_size, mid_mask)
        super().__init__(
            shape=shape,
            num_classes=num_classes,
            patch_size=patch_size,
            hidden_size=hidden_size,
            last_width=stage_widths[-1],
            learn_sigma=learn_sigma,
            null_class=null_class,
        )
        rows, columns = self.grid
        if rows % 4 or columns % 4:
            raise UsageError(
                f"EDT halves its grid of tokens twice: the {rows}x{columns} grid must divide by 4"
            )
        self.mid_mask = mid_mask
        self.grids = [(rows // f, columns // f) for f in (1, 2, 4, 2, 1)]
        self.pos_embed = nn.Parameter(sincos_table(self.grid, hidden_size), requires_grad=False)
        self.stages: Any = nn.ModuleList(
            nn.ModuleList(
                Block(width, heads, mlp_ratio, hidden_size, table_rows=(2 * r - 1) * (2 * c - 1))
                for _ in range(depth)
            )
            for width, depth, heads, (r, c) in zip(
                stage_widths, stage_depths, stage_heads, self.grids, strict=True
            )
        )
        w, g = stage_widths, self.grids
        self.down = nn.ModuleList(DownSample(w[i], w[i + 1], hidden_size, g[i + 1]) for i in (0, 1))
        self.up = nn.ModuleList(UpSample(w[i], w[i + 1], g[i]) for i in (2, 3))
        self.fuse = nn.ModuleList(Fuse(w[i], hidden_size, g[i]) for i in (3, 4))
        for i, grid in enumerate(g[:3]):
            self.register_buffer(f"index{i}", relative_index(grid), persistent=False)
        self.initialise()
        self.set_amm(amm, amm_formula)

    def numbered_blocks(self) -> list[tuple[Any, tuple[int, int]]]:
        return [
            (block, grid)
            for stage, grid in zip(self.stages, self.grids, strict=True)
            for block in stage
        ]

    def draw_masks(self, batch: int, generator: torch.Generator) -> TokenMasks:
        """The masks of one training pass, on the generator's device."""

        def draw(tokens: int, low: float, high: float) -> Tensor:
            probability = low + (high - low) * torch.rand(
                (), generator=generator, device=generator.device
            )
            return (
                torch.rand(batch, tokens, generator=generator, device=generator.device)
                < probability
            )

        tokens = self.grid[0] * self.grid[1]
        mid = draw(tokens, *MID_RANGE) if self.mid_mask else None
        down = (draw(tokens, *DOWN_RANGES[0]), draw(tokens // 4, *DOWN_RANGES[1]))
        return TokenMasks(down=down, mid=mid)

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None, route: Route | None = None
    ) -> Tensor:
        """Predict [B, C or 2C, H, W] from x [B, C, H, W] at network time t [B] and labels [B]
        (None: the null class).

        EDT drops no tokens. Its route is the `TokenMasks` of a training pass: what they hide does
        not reach the coarser stages, and still goes around them through the skips.
        """
        if route is not None and route.keep is not None:
            raise UsageError(
                "EDT cannot drop tokens (objective.name 'msm'): it hides them with masks of its own"
            )
        masks = route if isinstance(route, TokenMasks) else TokenMasks()
        c = self.condition(x, t, condition)  # [B, D]
        tokens = self.patch_embed(patchify(x, self.patch_size)) + self.pos_embed  # [B, L, D]
        skips = []
        for i, stage in enumerate(self.stages):
            # Into the stage: the inputs of the first two are joined to those of the last two.
            if i < 2:
                skips.append(tokens)
            elif i > 2:
                tokens = self.fuse[i - 3](self.up[i - 3](tokens), skips.pop(), c)

            # Its blocks, on the grid of this stage.
            index = getattr(self, f"index{min(i, 4 - i)}")
            for j, block in enumerate(stage):
                if i == 0 and j == MID_BLOCK and masks.mid is not None:
                    blank = self.pos_embed.to(tokens.dtype)
                    tokens = torch.where(masks.mid[..., None], blank, tokens)
                tokens = run_block(self, block, tokens, c, index)

            # Out of it, down to a quarter of the tokens.
            if i < 2:
                tokens = self.down[i](tokens, c, masks.down[i])
        return unpatchify(self.final(tokens, c), self.patch_size, self.grid)


def _check_stages(stages: dict[str, list[int]], hidden_size: int, mid_mask: bool) -> None:
    """Raises UsageError unless five stages mirror each other and suit the mask in the first."""
    for name, values in stages.items():
        if len(values) != 5:
            raise UsageError(
                f"model.stage_{name} {values} must have five numbers, one for each stage"
            )
    widths, depth = stages["widths"], stages["depths"][0]
    for width, heads in zip(widths, stages["heads"], strict=True):
        check_width("model.stage_widths", width, heads)
    if widths[0] != hidden_size or widths != widths[::-1]:
        raise UsageError(
            f"model.stage_widths {widths} must start with model.hidden_size {hidden_size} and read "
            "the same backwards"
        )
    if mid_mask and depth <= MID_BLOCK:
        raise UsageError(
            f"model.mid_mask needs more than {MID_BLOCK} blocks in the first stage, not {depth}"
        )
