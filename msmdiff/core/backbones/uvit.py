"""U-ViT (Bao et al. 2023, "All are Worth Words"), and MaskDM's use of it on visible patches only (Lei et al. 2023)."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msmdiff.core.backbones.layers import (
    Attention,
    Mlp,
    gather_tokens,
    patchify,
    timestep_embedding,
    unpatchify,
)
from msmdiff.core.errors import UsageError

# Published sizes. A depth d means d // 2 blocks, a middle block, d // 2 blocks: 12 and 13 are the same network.
SIZES: dict[str, dict] = {
    "tiny": dict(patch_size=2, hidden_size=64, depth=5, num_heads=4),
    "MaskDM-S/4": dict(patch_size=4, hidden_size=512, depth=13, num_heads=8),
    "MaskDM-B/4": dict(patch_size=4, hidden_size=768, depth=12, num_heads=12),
    "U-ViT-S/2": dict(patch_size=2, hidden_size=512, depth=12, num_heads=8, final_conv=True),
    "U-ViT-S/4": dict(patch_size=4, hidden_size=512, depth=12, num_heads=8, final_conv=True),
    "U-ViT-M/4": dict(patch_size=4, hidden_size=768, depth=16, num_heads=12, final_conv=True),
    "U-ViT-L/4": dict(patch_size=4, hidden_size=1024, depth=20, num_heads=16, final_conv=True),
    "U-ViT-L/2": dict(patch_size=2, hidden_size=1024, depth=20, num_heads=16, final_conv=True),
    "U-ViT-H/2": dict(patch_size=2, hidden_size=1152, depth=28, num_heads=16),
    "U-ViT-H/4": dict(patch_size=4, hidden_size=1152, depth=28, num_heads=16),
}


class Block(nn.Module):
    """Pre-norm transformer block; with `skip`, the concatenated long skip is projected down first."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool = False) -> None:
        super().__init__()
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """A transformer over [label,] time and patch tokens, with long skips from the first half to the second.

    Args:
        shape: (C, H, W) of the input; H and W must divide by patch_size.
        num_classes: 0 is unconditional. Otherwise the label table has one more row, the null class `num_classes`.
        patch_size: side of a patch.
        hidden_size: width of a token; must divide by num_heads.
        depth: depth // 2 blocks, one middle block, depth // 2 blocks with skips.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over hidden_size.
        qkv_bias: a bias in the qkv projection.
        skip: long skip connections.
        mlp_time_embed: Linear-SiLU-Linear on the time sinusoids.
        final_conv: a 3x3 convolution over the output image.

    Raises UsageError when the dimensions do not fit.
    """

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
        skip: bool = True,
        mlp_time_embed: bool = False,
        final_conv: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        if height % patch_size or width % patch_size:
            raise UsageError(f"model.patch_size {patch_size} does not divide the {height}x{width} input")
        if hidden_size % num_heads:
            raise UsageError(f"model.hidden_size {hidden_size} does not divide by model.num_heads {num_heads}")
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.num_classes = num_classes
        self.hidden_size = hidden_size
        self.gradient_checkpointing = False
        patch_width = patch_size**2 * channels

        self.patch_embed = nn.Linear(patch_width, hidden_size)
        self.time_embed = (
            nn.Sequential(nn.Linear(hidden_size, 4 * hidden_size), nn.SiLU(), nn.Linear(4 * hidden_size, hidden_size))
            if mlp_time_embed
            else nn.Identity()
        )
        self.label_emb = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        tokens = len(self.special_tokens) + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, hidden_size))

        block = (hidden_size, num_heads, mlp_ratio, qkv_bias)
        self.in_blocks = nn.ModuleList(Block(*block) for _ in range(depth // 2))
        self.mid_block = Block(*block)
        self.out_blocks = nn.ModuleList(Block(*block, skip=skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(hidden_size)
        self.to_output = nn.Linear(hidden_size, patch_width)
        self.final_conv = nn.Conv2d(channels, channels, 3, padding=1) if final_conv else None
        self.initialise()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens in front of the patches, in the order of their rows in `pos_embed`."""
        return ("label", "time") if self.label_emb is not None else ("time",)

    def initialise(self) -> None:
        """Truncated normal(0.02) for linear weights and positions, zero biases.

        The patch embedding and the label table keep torch's own initialisation, as the published networks do.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.patch_embed:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """Predict from x [B, C, H, W] at network time t [B] and labels y [B] (None: the null class).

        keep None returns an image [B, C, H, W]. keep [B, K] (token ids) embeds those patches only and returns their
        predictions [B, K, p*p*C] in the order of keep; the final convolution, where there is one, then sees zeros in
        place of hidden patches.
        """
        patches = patchify(x, self.patch_size)  # [B, L, p*p*C]
        extras = len(self.special_tokens)
        position = self.pos_embed[:, extras:]  # [1, L, D]
        if keep is not None:
            patches, position = gather_tokens(patches, keep), gather_tokens(position, keep)
        tokens = torch.cat(
            [self._special(x, t, y) + self.pos_embed[:, :extras], self.patch_embed(patches) + position], 1
        )

        skips = []
        for block in self.in_blocks:
            tokens = self._run(block, tokens)
            skips.append(tokens)
        tokens = self._run(self.mid_block, tokens)
        for block in self.out_blocks:
            tokens = self._run(block, tokens, skips.pop())

        out = self.to_output(self.norm(tokens[:, extras:]))  # [B, L or K, p*p*C]
        if keep is None:
            image = unpatchify(out, self.patch_size, self.grid)
            return self.final_conv(image) if self.final_conv is not None else image
        if self.final_conv is not None:
            canvas = out.new_zeros(len(out), self.grid[0] * self.grid[1], out.shape[-1])
            canvas = canvas.scatter(1, keep.unsqueeze(-1).expand_as(out), out)
            image = self.final_conv(unpatchify(canvas, self.patch_size, self.grid))
            out = gather_tokens(patchify(image, self.patch_size), keep)
        return out

    def _special(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        time = self.time_embed(timestep_embedding(t, self.hidden_size).to(self.pos_embed.dtype))[:, None]
        if self.label_emb is None:
            return time
        if y is None:
            y = torch.full((len(x),), self.num_classes, device=x.device)
        return torch.cat([self.label_emb(y)[:, None], time], dim=1)

    def _run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)
