"""Masked Diffusion Transformers: MDT (Gao et al. 2023) and MDTv2, whose side-interpolater fills in
hidden tokens.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from msmdiff.core.backbones.adaln import AdaLNTransformer, Amm, Block, check_width
from msmdiff.core.backbones.dit import WIDTHS
from msmdiff.core.backbones.layers import (
    gather_tokens,
    patchify,
    relative_index,
    select_pairs,
    sincos_table,
    unpatchify,
)
from msmdiff.core.errors import UsageError

SIZES: dict[str, dict] = {
    f"MDT-{size}/{p}": dict(family="mdt", patch_size=p, **fields, decode_layers=2, learn_sigma=True)
    for size, fields in WIDTHS.items()
    for p in (2, 4, 8)
}
# How many of the blocks decode: from the training script (S) and the released model (XL); no script
# fixes B and L.
SIZES |= {
    f"MDTv2-{size}/2": dict(
        family="mdtv2", patch_size=2, **WIDTHS[size], decode_layers=decode_layers, learn_sigma=True
    )
    for size, decode_layers in {"S": 6, "B": 6, "L": 4, "XL": 4}.items()
}

# The published tables have three rows more than there are relative positions. They are never read,
# but stored.
SPARE_ROWS = 3


class _MaskedDiffusionTransformer(AdaLNTransformer):
    """Both versions: learned positions for encoder and decoder, relative-position biases, and the
    side block.

    Args: as `DiT`, and
        decode_layers: blocks behind the side-interpolater, which see all tokens.
    """

    index: Tensor

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
            shape, num_classes, patch_size, hidden_size, hidden_size, learn_sigma, null_class
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
        self, x: Tensor, t: Tensor, y: Tensor | None = None, keep: Tensor | None = None
    ) -> Tensor:
        """Predict from x [B, C, H, W] at network time t [B] and labels y [B] (None: the null
        class).

        The output is the whole image [B, C or 2C, H, W] also where keep [B, K] (token ids) is
        given: then the encoder sees those tokens only, the side block guesses the others, and the
        decoder sees all.
        """
        embedded = self.patch_embed(patchify(x, self.patch_size)) + self.pos_embed  # [B, L, D]
        c = self.condition(x, t, y)  # [B, D]
        if keep is None:
            tokens = self.encode(embedded, c, self.index, None) + self.decoder_pos_embed
        else:
            index = select_pairs(self.index, keep)
            tokens = self._interpolate(
                self.encode(gather_tokens(embedded, keep), c, index, keep), c, keep
            )
        tokens = self.decode(tokens, c, embedded)
        return unpatchify(self.final(tokens, c), self.patch_size, self.grid)

    def encode(self, tokens: Tensor, c: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        """The blocks that see kept tokens only: [B, L or K, D] -> the same shape."""
        raise NotImplementedError

    def decode(self, tokens: Tensor, c: Tensor, embedded: Tensor) -> Tensor:
        """The blocks that see all tokens [B, L, D]; embedded [B, L, D] is the encoder's unmasked
        input.
        """
        raise NotImplementedError

    def _interpolate(self, kept: Tensor, c: Tensor, keep: Tensor) -> Tensor:
        """Kept tokens [B, K, D] -> all tokens [B, L, D], the hidden ones predicted from the mask
        token.
        """
        b, _, d = kept.shape
        everywhere = self.mask_token.to(kept.dtype).expand(b, self.index.shape[0], d)
        tokens = (
            everywhere.scatter(1, keep.unsqueeze(-1).expand_as(kept), kept) + self.decoder_pos_embed
        )
        hidden = torch.ones_like(tokens[..., :1], dtype=torch.bool).scatter(
            1, keep.unsqueeze(-1), False
        )
        return torch.where(hidden, self._run(self.side[0], tokens, c, self.index), tokens)


class MDT(_MaskedDiffusionTransformer):
    """MDT, version 1: one row of blocks, of which the last `decode_layers` see all tokens."""

    def _make_trunk(self, depth: int, decode_layers: int) -> None:
        self.decode_layers = decode_layers
        self.blocks = self._make_blocks(depth)

    def numbered_blocks(self) -> list[tuple[Any, tuple[int, int]]]:
        return [(block, self.grid) for block in self.blocks]

    def encode(self, tokens: Tensor, c: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        for block in self.blocks[: len(self.blocks) - self.decode_layers]:
            tokens = self._run(block, tokens, c, index, keep)
        return tokens

    def decode(self, tokens: Tensor, c: Tensor, embedded: Tensor) -> Tensor:
        for block in self.blocks[len(self.blocks) - self.decode_layers :]:
            tokens = self._run(block, tokens, c, self.index)
        return tokens


class MDTv2(_MaskedDiffusionTransformer):
    """MDTv2: long skips inside the encoder, and from its input to every block of the decoder.

    The blocks that do not decode form the encoder's two halves; an odd one is lost.
    """

    AMM: ClassVar = {12: [(0.0, [8])]}

    def _make_trunk(self, depth: int, decode_layers: int) -> None:
        half = (depth - decode_layers) // 2
        self.in_blocks = self._make_blocks(half)
        self.out_blocks = self._make_blocks(half, skip=True)
        self.decoder = self._make_blocks(decode_layers, skip=True)

    def numbered_blocks(self) -> list[tuple[Any, tuple[int, int]]]:
        return [(block, self.grid) for block in (*self.in_blocks, *self.out_blocks, *self.decoder)]

    def encode(self, tokens: Tensor, c: Tensor, index: Tensor, keep: Tensor | None) -> Tensor:
        skips = []
        for block in self.in_blocks:
            tokens = self._run(block, tokens, c, index, keep)
            skips.append(tokens)
        for block in self.out_blocks:  # the first one sees its own input twice, as published
            tokens = self._run(block, tokens, c, index, keep, skips.pop())
        return tokens

    def decode(self, tokens: Tensor, c: Tensor, embedded: Tensor) -> Tensor:
        for block in self.decoder:
            tokens = self._run(block, tokens, c, self.index, None, embedded)
        return tokens
