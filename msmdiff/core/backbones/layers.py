"""Pieces that several backbones share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patchify(x: Tensor, p: int) -> Tensor:
    """[B, C, H, W] -> [B, L, p*p*C]: row-major tokens, each ordered (row, column, channel), channel fastest."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(tokens: Tensor, p: int, grid: tuple[int, int]) -> Tensor:
    """[B, L, p*p*C] -> [B, C, H, W], the inverse of `patchify` on a (rows, columns) grid of tokens."""
    b, (rows, columns) = len(tokens), grid
    x = tokens.view(b, rows, columns, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * p, columns * p)


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """x [B or 1, L, D] at the ids keep [B, K] -> [B, K, D]."""
    return x.expand(len(keep), -1, -1).gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of t [B] -> float32 [B, width]: cosines, then sines, a zero at the end where width is odd."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v [B, heads, L, d]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's fused CPU kernel is slower than two matrix products in bf16; the softmax itself runs in float32.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention: one qkv Linear ordered (q, k, v)(head)(dim), then a projection with bias."""

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        b, l, d = x.shape
        q, k, v = self.qkv(x).view(b, l, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)  # [B, h, L, d]
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(b, l, d))


class Mlp(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner)
        self.fc2 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
