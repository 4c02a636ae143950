"""What blocks are made of: attention, MLP and norm, as published and as a new network may have
them.

`BlockOptions` declares the choices once. A family whose class is registered with
`options=BlockOptions` takes them as further keyword arguments.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, StrictBool
from torch import Tensor, nn

from msmdiff.core.backbones.layers import attention, select_pairs
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options

EPS = 1e-6
ROPE_BASE = 10_000.0

Norm = Literal["layer", "rms"]


class BlockOptions(Options):
    """Off, as in every published network, by default."""

    norm: Norm = Field(
        "layer", description="The norm of blocks and output: LayerNorm, or RMSNorm (`rms`)."
    )
    qk_norm: StrictBool = Field(
        False, description="Normalise queries and keys over a head's channels (RMSNorm)."
    )
    mlp: Literal["gelu", "swiglu"] = Field(
        "gelu", description="The blocks' MLP; `swiglu` is two thirds as wide, and costs the same."
    )
    rope: StrictBool = Field(
        False,
        description="Turn queries and keys by the row and column of their tokens, beside the "
        "network's own positions.",
    )
    value_residual: StrictBool = Field(
        False, description="Mix each block's values with the first block's, by a learned share."
    )

    def unlike(self, other: "BlockOptions") -> list[str]:
        """What differs from another network's, for people."""
        theirs = other.model_dump()
        return [
            f"model.{name} {value}, not {theirs[name]}"
            for name, value in self.model_dump().items()
            if value != theirs[name]
        ]

    def light(self) -> "BlockOptions":
        """Those of the light blocks of a sparse part, which have no first block's values."""
        return self.model_copy(update={"value_residual": False})


def options_of(network: Any) -> BlockOptions:
    """A network's choices; of a family that offers none, the published ones."""
    found: BlockOptions = getattr(network, "block_options", BlockOptions())
    return found


# ------------------------------------------------------------------ norms


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6), scaled by a learned number for each channel (Zhang & Sennrich
    2019).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        return F.rms_norm(x, x.shape[-1:], eps=EPS) * self.weight


def learned_norm(kind: Norm, width: int) -> nn.Module:
    """A norm with parameters."""
    return RMSNorm(width) if kind == "rms" else nn.LayerNorm(width)


def normalise(x: Tensor, kind: Norm = "layer") -> Tensor:
    """x [..., D] normalised over D, without parameters."""
    norm = F.rms_norm if kind == "rms" else F.layer_norm
    return norm(x, x.shape[-1:], eps=EPS)


# ------------------------------------------------------------------ positions


def places_of(grid: tuple[int, int], extras: int = 0) -> Tensor:
    """(row, column) of every token, float32 [1, extras + rows * columns, 2]. The special tokens in
    front stand at (0, 0), where nothing is turned.
    """
    rows, columns = grid
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return F.pad(torch.stack([row, column], dim=-1).float(), (0, 0, extras, 0))[None]


def rotate(x: Tensor, places: Tensor) -> Tensor:
    """Turn pairs of channels of x [B, heads, L, d] by angles in proportion to places
    [1 or B, L, 2] (RoPE; Su et al. 2021, in two dimensions): a quarter of the channels by the row
    and a quarter by the column, each with its partner in the second half.

    A product of two turned vectors depends on the difference of their places only. d must divide
    by 4.
    """
    quarter = x.shape[-1] // 4
    steps = torch.arange(quarter, dtype=torch.float32, device=x.device) / quarter
    angles = (places[..., None] * ROPE_BASE**-steps).flatten(-2)[:, None]  # [1 or B, 1, L, d / 2]
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


# ------------------------------------------------------------------ attention


class Attention(nn.Module):
    """Multi-head self-attention: one qkv Linear ordered (q, k, v)(head)(dim), then a projection
    with bias.

    With `table_rows`, each head adds a learned bias for the relative position of query and key.
    `factor`, where a backbone sets it, multiplies the probabilities in evaluation mode (AMM).

    Args:
        options: queries and keys are normalised, then turned, as they say.
        first: with `value_residual`, whether this is the first block's, which gives its values away
            (Zhou et al. 2024); the others mix them in, v + share (v_first - v), from share 0.5.

    Raises UsageError where a head's width does not suit the positions.
    """

    factor: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        qkv_bias: bool = False,
        table_rows: int = 0,
        *,
        options: BlockOptions | None = None,
        first: bool = False,
    ) -> None:
        super().__init__()
        options = options or BlockOptions()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.bias_table = nn.Parameter(torch.zeros(table_rows, num_heads)) if table_rows else None
        self.register_buffer("factor", None, persistent=False)

        head = hidden_size // num_heads
        if options.rope and head % 4:
            raise UsageError(
                f"model.rope turns quarters of a head's channels by row and column: {num_heads} "
                f"heads in a width of {hidden_size} have {head} each, which must divide by 4"
            )
        self.rope = options.rope
        self.q_norm = RMSNorm(head) if options.qk_norm else None
        self.k_norm = RMSNorm(head) if options.qk_norm else None
        self.gives_values = options.value_residual and first
        mixes = options.value_residual and not first
        self.value_share = nn.Parameter(torch.full((1,), 0.5)) if mixes else None

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        keep: Tensor | None = None,
        *,
        places: Tensor | None = None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, L, D] -> [B, L, D], and its values [B, L, D] where it gives them away.

        index [L, L] or [B, L, L]: rows of the bias table; keep [B, L]: x's token ids; places [1 or
        B, L, 2] and first_values [B, L, D]: of the same tokens.
        """
        b, l, d = x.shape
        # [B, h, L, d]
        q, k, v = (
            self.qkv(x).view(b, l, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        )
        values = v.transpose(1, 2).flatten(2) if self.gives_values else None
        if self.value_share is not None:
            assert first_values is not None
            first = first_values.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            v = v + self.value_share.to(v.dtype) * (first - v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if self.rope:
            assert places is not None
            q, k = rotate(q, places), rotate(k, places)
        bias = factor = None
        if self.bias_table is not None and index is not None:
            # Fused kernels want a bias whose keys lie side by side: [1 or B, h, L, L].
            picked = self.bias_table.t().index_select(1, index.flatten())
            bias = picked.view(self.num_heads, -1, l, l).transpose(0, 1)
        if self.factor is not None and not self.training:
            factor = select_pairs(self.factor, keep)
            factor = factor if keep is None else factor[:, None]
        heads = attention(q=q, k=k, v=v, bias=bias, factor=factor)
        return self.proj(heads.transpose(1, 2).reshape(b, l, d)), values


# ------------------------------------------------------------------ MLPs


class Mlp(nn.Module):
    """Linear, GELU (exact, or with `approximate` "tanh" the approximation of DiT), Linear."""

    def __init__(
        self, hidden_size: int, inner: int, approximate: Literal["none", "tanh"] = "none"
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class SwiGLU(nn.Module):
    """Linear to a gate and a value, SiLU of the gate times the value, Linear (Shazeer 2020). With
    2/3 of the inner width it has as many parameters as `Mlp`.
    """

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        inner = max(1, 2 * inner // 3)
        self.fc1 = nn.Linear(hidden_size, 2 * inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def feed_forward(options: BlockOptions, hidden_size: int, inner: int, **gelu: Any) -> nn.Module:
    """The MLP of a block; `gelu` is what `Mlp` takes beside its widths."""
    return (
        SwiGLU(hidden_size, inner) if options.mlp == "swiglu" else Mlp(hidden_size, inner, **gelu)
    )
