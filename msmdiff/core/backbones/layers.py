"""Pieces that several backbones share."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, p: int) -> Tensor:
    """[B, C, H, W] -> [B, L, p*p*C]: row-major tokens, each ordered (row, column, channel), channel
    fastest.
    """
    return rearrange(x, "b c (rows p) (columns q) -> b (rows columns) (p q c)", p=p, q=p)


def unpatchify(tokens: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """[B, L, p*p*C] -> [B, C, H, W], the inverse of `patchify` on a (rows, columns) grid."""
    to_image = "b (rows columns) (p q c) -> b c (rows p) (columns q)"
    return rearrange(tokens, to_image, rows=grid[0], columns=grid[1], p=p, q=p)


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """x [B or 1, L, D] at the ids keep [B, K] -> [B, K, D]."""
    return x.expand(len(keep), -1, -1).gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of t [B] -> float32 [B, width]: cosines, then sines, a zero at the end where width
    is odd.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


def sincos_table(grid: tuple[int, int], width: int) -> Tensor:
    """The fixed positions of DiT and EDT, float32 [1, rows * columns, width].

    The first half of the channels encodes the column, the second half the row; each half is sines,
    then cosines.
    """
    rows, columns = grid
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    halves = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return torch.cat(
        [wave for angles in halves for wave in (angles.sin(), angles.cos())], dim=1
    ).float()[None]


def relative_index(grid: tuple[int, int]) -> Tensor:
    """Row of the relative-position table for every (query, key): int64 [L, L], query minus key,
    rows before columns.
    """
    rows, columns = grid
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    dy, dx = row[:, None] - row, column[:, None] - column
    return (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1


def select_pairs(table: Tensor, keep: Tensor | None) -> Tensor:
    """A table [L, L] over pairs of tokens, for the tokens keep [B, K] only: [B, K, K] (None: the
    table itself).
    """
    return table if keep is None else table[keep[:, :, None], keep[:, None, :]]


def amm_matrix(grid: tuple[int, int], formula: Literal["exp", "cos"] = "exp") -> Tensor:
    """EDT's attention modulation matrix (Chen et al. 2024, section 3.3), float32 [L, L], to
    multiply probabilities by.

    It falls with the distance d of two tokens, 0.5 exp(cos(2 pi d / T)) with T = 4 sqrt(2) (n - 1)
    on an n x n grid, and is zero beyond sqrt(4 + (n - 1)^2). `cos` is the 512-pixel model's 1.3
    cos(2 pi d / T).
    """
    rows, columns = grid
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    side = max(max(grid) - 1, 1)
    wave = torch.cos(2 * math.pi * squared.double().sqrt() / (4 * math.sqrt(2) * side))
    values = 0.5 * torch.exp(wave) if formula == "exp" else 1.3 * wave
    return torch.where(squared <= 4 + side**2, values, 0.0).float()


_plain = False


@contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, attention is made of matrix products: fused kernels have no forward derivative."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, factor: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v for q, k, v [B, heads, L, d].

    bias [B or 1, heads, L, L] is added to the scores; factor, broadcast likewise, multiplies the
    probabilities.
    """
    # torch's fused CPU kernel is slower than two matrix products in bf16, and no fused kernel knows
    # a factor.
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if factor is not None or slow or _plain:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            scores = scores + bias
        probabilities = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        if factor is not None:
            probabilities = probabilities * factor
        return probabilities.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
