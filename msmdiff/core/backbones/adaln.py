"""What DiT, MDT and EDT share: norms that are shifted, scaled and gated by time and label
(adaLN-zero).
"""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msmdiff.core.backbones.blocks import Attention, BlockOptions, Norm, feed_forward, normalise
from msmdiff.core.backbones.interval import IntervalEmbed, add_interval
from msmdiff.core.backbones.layers import amm_matrix, timestep_embedding
from msmdiff.core.backbones.routes import check_patches, class_or_null
from msmdiff.core.errors import UsageError

TIME_WIDTH = 256
Amm = Literal["off", "default"] | list[int]


def modulate(x: Tensor, shift: Tensor, scale: Tensor, norm: Norm = "layer") -> Tensor:
    """Normalise x [B, L, D] (no parameters, eps 1e-6), then scale and shift it by [B, D]."""
    return normalise(x, norm) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """adaLN-zero block (Peebles & Xie 2023, figure 3); with `skip`, the concatenated skip is
    projected down first. `options` and `first` are for `Attention` too.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        condition: int,
        table_rows: int = 0,
        skip: bool = False,
        *,
        options: BlockOptions | None = None,
        first: bool = False,
    ) -> None:
        super().__init__()
        options = options or BlockOptions()
        self.norm = options.norm
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.attn = Attention(
            width, num_heads, qkv_bias=True, table_rows=table_rows, options=options, first=first
        )
        self.mlp = feed_forward(options, width, int(width * mlp_ratio), approximate="tanh")
        self.modulation = nn.Linear(condition, 6 * width)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        index: Tensor | None = None,
        keep: Tensor | None = None,
        skip: Tensor | None = None,
        **told: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, L, D] under the condition c [B, C] -> [B, L, D], and the values that `Attention`
        gives away; index, keep and what is told as `Attention` takes them; skip [B, L, D].
        """
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(c)).chunk(
            6, dim=1
        )
        attended, values = self.attn(modulate(x, shift_a, scale_a, self.norm), index, keep, **told)
        x = x + gate_a[:, None] * attended
        x = x + gate_m[:, None] * self.mlp(modulate(x, shift_m, scale_m, self.norm))
        return x if values is None else (x, values)


class FinalLayer(nn.Module):
    """Modulated norm, then a Linear to patch vectors."""

    def __init__(self, width: int, patch_width: int, condition: int, norm: Norm = "layer") -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.Linear(width, patch_width)
        self.modulation = nn.Linear(condition, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, L, D], c [B, C] -> [B, L, patch_width]."""
        shift, scale = self.modulation(F.silu(c)).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale, self.norm))


class AdaLNTransformer(nn.Module):
    """The ends of such a network: patches in, time and label embedded, patch vectors out.
    Subclasses add the blocks.

    Args:
        shape: (C, H, W) of the input; H and W must divide by patch_size.
        num_classes: 0 is unconditional.
        null_class: the label table has one more row, the null class `num_classes`.
        hidden_size: width of the condition, and of the first tokens.
        last_width: width of the last tokens.
        learn_sigma: twice the channels out: the prediction, then the variance between its two
            bounds.
        norm: of the output.
        bottleneck: patches are projected to this width first, without bias; 0: they are not.
    """

    AMM: ClassVar[dict[int, list[tuple[float, list[int]]]]] = {}
    """AMM's blocks as EDT's authors chose them: depth -> [(from this guidance scale on, block
    numbers)].
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        patch_size: int,
        hidden_size: int,
        last_width: int,
        learn_sigma: bool,
        null_class: bool,
        norm: Norm = "layer",
        bottleneck: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.patch_size = patch_size
        self.grid = check_patches(height, width, patch_size)
        self.num_classes = num_classes
        self.null_class = null_class
        self.hidden_size = hidden_size
        self.learn_sigma = learn_sigma
        self.gradient_checkpointing = False
        patch_width = patch_size**2 * channels

        self.patch_embed: nn.Module = nn.Linear(bottleneck or patch_width, hidden_size)
        if bottleneck:
            narrow = nn.Linear(patch_width, bottleneck, bias=False)
            self.patch_embed = nn.Sequential(narrow, self.patch_embed)
        self.time_embed: Any = nn.Sequential(
            nn.Linear(TIME_WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.interval_embed: IntervalEmbed | None = None  # of DiT, where it is asked for
        self.label_emb = (
            nn.Embedding(num_classes + null_class, hidden_size) if num_classes else None
        )
        self.final = FinalLayer(last_width, patch_width * (1 + learn_sigma), hidden_size, norm)

    special_tokens: tuple[str, ...] = ()
    """Tokens in front of the patches: none, time and label come in through the norms."""

    def initialise(self) -> None:
        """DiT's start: every block is the identity, and the output zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Attention) and module.bias_table is not None:
                nn.init.trunc_normal_(module.bias_table, std=0.02)
        for embedding in (self.time_embed[0], self.time_embed[2], self.label_emb):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):
                nn.init.zeros_(module.modulation.weight)
            elif isinstance(module, IntervalEmbed):
                module.initialise()
        nn.init.zeros_(self.final.linear.weight)

    def condition(
        self, x: Tensor, t: Tensor, y: Tensor | None, interval: Tensor | None = None
    ) -> Tensor:
        """Network time t [B], labels y [B] (None: the null class) and, of a network that knows
        them, intervals [B] -> the condition [B, hidden_size].
        """
        sinusoids = timestep_embedding(t, TIME_WIDTH).to(self.final.linear.weight.dtype)
        c = add_interval(self.interval_embed, self.time_embed(sinusoids), interval)
        if self.label_emb is None:
            return c
        return c + self.label_emb(class_or_null(self, y, len(x), x.device))

    def numbered_blocks(self) -> list[tuple[Any, tuple[int, int]]]:
        """The blocks in the order AMM counts them, each with its grid."""
        raise NotImplementedError

    def trunk_blocks(self) -> list[nn.Module]:
        """The blocks that a pass without a mask goes through, in its order."""
        return [block for block, _ in self.numbered_blocks()]

    def set_amm(
        self, amm: Amm, formula: Literal["exp", "cos"] = "exp", cfg_scale: float = 1.0
    ) -> None:
        """Switch the attention modulation matrix on (in evaluation mode) in the blocks that `amm`
        numbers.

        `default` takes the published blocks for this depth and guidance scale. Raises UsageError
        where there are none, or no such block.
        """
        blocks = self.numbered_blocks()
        if amm == "default":
            if len(blocks) not in self.AMM:
                raise UsageError(
                    f"model.amm 'default' is published for {' and '.join(map(str, self.AMM))} "
                    "blocks, and this "
                    f"network has {len(blocks)}: list the block numbers, or use off"
                )
            amm = [layers for start, layers in self.AMM[len(blocks)] if cfg_scale >= start][-1]
        chosen = [] if amm == "off" else amm
        if chosen and self.special_tokens:
            raise UsageError(
                f"model.amm {chosen} modulates the attention between patches: a network with "
                "model.class_tokens has others too, use off"
            )
        if wrong := [i for i in chosen if not 0 <= i < len(blocks)]:
            raise UsageError(
                f"model.amm names block {wrong[0]}; this network's blocks are 0..{len(blocks) - 1}"
            )
        for i, (block, grid) in enumerate(blocks):
            block.attn.factor = (
                amm_matrix(grid, formula).to(block.attn.qkv.weight) if i in chosen else None
            )


def check_width(option: str, width: int, num_heads: int) -> None:
    """Raises UsageError unless a width suits its heads and the sine-cosine positions."""
    if width % num_heads or width % 4:
        divisor = math.lcm(num_heads, 4)
        raise UsageError(
            f"{option} {width} must divide by 4 (positions) and by the {num_heads} "
            "attention heads; "
            f"the nearest that does is {max(1, round(width / divisor)) * divisor}"
        )
