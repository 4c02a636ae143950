"""Masked Diffusion Transformers: MDT (Gao et al. 2023) and MDTv2, whose side-interpolater fills in
hidden tokens.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from msmdiff.core.backbones.adaln import AdaLNTransformer, Amm, Block, check_width
from msmdiff.core.backbones.dit import WIDTHS
from msmdiff.core.backbones.family import family
from msmdiff.core.backbones.layers import (
    patchify,
    relative_index,
    select_pairs,
    sincos_table,
    unpatchify,
)
from msmdiff.core.backbones.routes import Route, Trunk, run_block
from msmdiff.core.errors import UsageError

SIZES: dict[str, dict] = {
    f"MDT-{size}/{p}": dict(patch_size=p, **fields, decode_layers=2, learn_sigma=True)
    for size, fields in WIDTHS.items()
    for p in (2, 4, 8)
}
# How many of the blocks decode: from the training script (S) and the released model (XL); no script
# fixes B and L.
SIZES_V2: dict[str, dict] = {
    f"MDTv2-{size}/2": dict(
        patch_size=2, **WIDTHS[size], decode_layers=decode_layers, learn_sigma=True
    )
    for size, decode_layers in {"S": 6, "B": 6, "L": 4, "XL": 4}.items()
}


def _published_names(sizes: dict[str, dict]) -> dict[str, str]:
    return {name.replace("-", "_").replace("/", "_"): name for name in sizes}


# The published tables have three rows more than there are relative positions. They are never read,
# but stored.
SPARE_ROWS = 3


class _MaskedDiffusionTransformer(AdaLNTransformer):
    """Both versions: learned positions for encoder and decoder, relative-position biases, and the
    side block.

    Args:
        shape: (C, H, W) of the input; H and W must divide by patch_size.
        num_classes: 0 is unconditional.
        patch_size: side of a patch.
        hidden_size: width of a token; must divide by num_heads and by 4.
        depth: blocks, those of the decoder included.
        num_heads: attention heads.
        decode_layers: blocks behind the side-interpolater, which see all tokens.
        mlp_ratio: inner width of the MLP over hidden_size.
        learn_sigma: predict the variance too.
        null_class: the label table has one more row, the null class; the default of every published
            network.
        amm: blocks whose attention EDT's matrix modulates while sampling: off, default, or their
            numbers.
        amm_formula: the matrix, `exp`, or `cos` as at 512 pixels.
    """

    fills: ClassVar = frozenset({"own", "mask", "side"})
    published_objective: ClassVar = "mdt"
    published_spread: ClassVar = 0.0
    """How much more than the ratio a step of its training may hide."""

    index: Tensor
    trunk: Trunk
    encoder_depth: int
    decoder_skips: ClassVar[bool]
    """Whether every block of the decoder is joined with the network's embedded input."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        *,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        decode_layers: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        null_class: bool = True,
        amm: Amm = "off",
        amm_formula: Literal["exp", "cos"] = "exp",
    ) -> None:
        check_width("model.hidden_size", hidden_size, num_heads)
        if not 0 <= decode_layers <= depth:
            raise UsageError(
                f"model.decode_layers {decode_layers} must lie between 0 and model.depth {depth}"
            )
        super().__init__(
            shape=shape,
            num_classes=num_classes,
            patch_size=patch_size,
            hidden_size=hidden_size,
            last_width=hidden_size,
            learn_sigma=learn_sigma,
            null_class=null_class,
        )
        rows, columns = self.grid
        self._block = dict(
            width=hidden_size,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            condition=hidden_size,
            table_rows=(2 * rows - 1) * (2 * columns - 1) + SPARE_ROWS,
        )
        self.pos_embed = nn.Parameter(sincos_table(self.grid, hidden_size))
        self.decoder_pos_embed = nn.Parameter(sincos_table(self.grid, hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.register_buffer("index", relative_index(self.grid), persistent=False)
        self.side = self._make_blocks(1)
        self._make_trunk(depth, decode_layers)
        self.initialise()
        self.set_amm(amm, amm_formula)

    def _make_trunk(self, depth: int, decode_layers: int) -> None:
        """Make the blocks of encoder and decoder."""
        raise NotImplementedError

    def _make_blocks(self, count: int, skip: bool = False) -> nn.ModuleList:
        return nn.ModuleList(Block(**self._block, skip=skip) for _ in range(count))  # type: ignore[arg-type]

    def initialise(self) -> None:
        super().initialise()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None, route: Route | None = None
    ) -> Tensor:
        """Predict the whole image [B, C or 2C, H, W] from x [B, C, H, W] at network time t [B] and
        labels [B] (None: the null class).

        Along MDT's own route (fill `side`, leaving where the decoder begins) the encoder sees the
        kept tokens only, the side block guesses the others, and the decoder sees all.
        """
        keep = route.keep if route is not None else None
        embedded = self.patch_embed(patchify(x, self.patch_size)) + self.pos_embed  # [B, L, D]
        c = self.condition(x, t, condition)  # [B, D]
        blocks = self.trunk_blocks()
        # Biases, the decoder's positions and its skip, for all tokens and for the kept ones.
        kept_index = None if keep is None else select_pairs(self.index, keep)

        def step(number: int, z: Tensor, skip: Tensor | None, ids: Tensor | None) -> Tensor:
            if number == self.encoder_depth and not self._placed(route):
                z = z + self.trunk.narrowed(self.decoder_pos_embed, ids)
            if number >= self.encoder_depth and self.decoder_skips:
                skip = self.trunk.narrowed(embedded, ids)
            index = self.index if ids is None else kept_index
            return run_block(self, blocks[number], z, c, index, ids, skip)

        def fill(before: Tensor, kept: Tensor) -> Tensor:
            assert route is not None
            assert keep is not None
            if route.fill == "own":
                return self.trunk.own(before, kept, keep)
            return self._interpolate(kept, c, keep, side=route.fill == "side")

        if self._placed(route) and route is not None and route.leave != self.encoder_depth:
            raise UsageError(
                f"a route with fill '{route.fill}' leaves at {self.encoder_depth} here"
            )
        tokens = self.trunk.run(embedded, route, step, fill)  # [B, L, D]
        if self.encoder_depth == self.trunk.depth and not self._placed(route):
            tokens = tokens + self.decoder_pos_embed
        return unpatchify(self.final(tokens, c), self.patch_size, self.grid)

    def _placed(self, route: Route | None) -> bool:
        """Whether filling the gaps gives the tokens the decoder's positions too."""
        return route is not None and route.keep is not None and route.fill in ("mask", "side")

    def _interpolate(self, kept: Tensor, c: Tensor, keep: Tensor, side: bool) -> Tensor:
        """Kept tokens [B, K, D] -> all tokens [B, L, D]: mask tokens in the gaps, and in their
        place what the side block makes of them.
        """
        b, _, d = kept.shape
        place = keep.unsqueeze(-1)
        everywhere = self.mask_token.to(kept.dtype).expand(b, self.index.shape[0], d)
        everywhere = everywhere.scatter(1, place.expand_as(kept), kept)
        tokens = everywhere + self.decoder_pos_embed
        if not side:
            return tokens
        hidden = torch.ones_like(tokens[..., :1], dtype=torch.bool).scatter(1, place, False)
        guessed = run_block(self, self.side[0], tokens, c, self.index)
        return torch.where(hidden, guessed, tokens)


@family("mdt", SIZES, _published_names(SIZES))
class MDT(_MaskedDiffusionTransformer):
    """MDT, version 1: one row of blocks, of which the last `decode_layers` see all tokens."""

    decoder_skips = False

    def _make_trunk(self, depth: int, decode_layers: int) -> None:
        self.encoder_depth = depth - decode_layers
        self.blocks = self._make_blocks(depth)
        self.trunk = Trunk(depth, {})

    def numbered_blocks(self) -> list[tuple[Any, tuple[int, int]]]:
        return [(block, self.grid) for block in self.blocks]


@family("mdtv2", SIZES_V2, _published_names(SIZES_V2))
class MDTv2(_MaskedDiffusionTransformer):
    """MDTv2: long skips inside the encoder, and from its input to every block of the decoder.

    The blocks that do not decode form the encoder's two halves; an odd one is lost.
    """

    AMM: ClassVar = {12: [(0.0, [8])]}
    published_spread: ClassVar = 0.2
    decoder_skips = True

    def _make_trunk(self, depth: int, decode_layers: int) -> None:
        half = (depth - decode_layers) // 2
        self.encoder_depth = 2 * half
        self.in_blocks = self._make_blocks(half)
        self.out_blocks = self._make_blocks(half, skip=True)
        self.decoder = self._make_blocks(decode_layers, skip=True)
        # The first block with a skip sees its own input twice, as published.
        joins = {half + i: half - 1 - i for i in range(half)}
        self.trunk = Trunk(2 * half + decode_layers, joins)

    def numbered_blocks(self) -> list[tuple[Any, tuple[int, int]]]:
        return [(block, self.grid) for block in (*self.in_blocks, *self.out_blocks, *self.decoder)]
