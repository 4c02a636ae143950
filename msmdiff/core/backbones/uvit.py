"""U-ViT (Bao et al. 2023, "All are Worth Words"), and MaskDM's use of it on visible patches only
(Lei et al. 2023).
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from msmdiff.core.backbones import sparse as parts
from msmdiff.core.backbones.blocks import (
    Attention,
    BlockOptions,
    feed_forward,
    learned_norm,
    places_of,
)
from msmdiff.core.backbones.family import family
from msmdiff.core.backbones.interval import IntervalEmbed, add_interval
from msmdiff.core.backbones.layers import (
    gather_tokens,
    patchify,
    timestep_embedding,
    unpatchify,
)
from msmdiff.core.backbones.routes import (
    Pass,
    Route,
    Trunk,
    check_patches,
    class_or_null,
    own_only,
    partial,
)
from msmdiff.core.errors import UsageError

SMALL = {  # of ours, to learn in minutes: 0.3, 1.5 and 7.7 M parameters
    "N": dict(hidden_size=64, depth=5, num_heads=4),
    "XXS": dict(hidden_size=128, depth=7, num_heads=4),
    "XS": dict(hidden_size=256, depth=9, num_heads=8),
}

# Published sizes but for the small ones. A depth d means d // 2 blocks, a middle block, d // 2
# blocks: 12 and 13 are the same network.
SIZES: dict[str, dict] = {
    "tiny": dict(patch_size=2, hidden_size=64, depth=5, num_heads=4),
    "MaskDM-S/4": dict(patch_size=4, hidden_size=512, depth=13, num_heads=8),
    "MaskDM-B/4": dict(patch_size=4, hidden_size=768, depth=12, num_heads=12),
    "U-ViT-S/2": dict(patch_size=2, hidden_size=512, depth=12, num_heads=8, final_conv=True),
    "U-ViT-S/4": dict(patch_size=4, hidden_size=512, depth=12, num_heads=8, final_conv=True),
    "U-ViT-M/4": dict(patch_size=4, hidden_size=768, depth=16, num_heads=12, final_conv=True),
    "U-ViT-L/4": dict(patch_size=4, hidden_size=1024, depth=20, num_heads=16, final_conv=True),
    "U-ViT-L/2": dict(patch_size=2, hidden_size=1024, depth=20, num_heads=16, final_conv=True),
    "U-ViT-S/2-T2I": dict(
        patch_size=2,
        hidden_size=512,
        depth=12,
        num_heads=8,
        final_conv=True,
        context_tokens=77,
        context_width=768,
    ),
    "U-ViT-S/2-T2I-Deep": dict(
        patch_size=2,
        hidden_size=512,
        depth=16,
        num_heads=8,
        final_conv=True,
        context_tokens=77,
        context_width=768,
    ),
    "U-ViT-H/2": dict(patch_size=2, hidden_size=1152, depth=28, num_heads=16),
    "U-ViT-H/4": dict(patch_size=4, hidden_size=1152, depth=28, num_heads=16),
    **{
        f"U-ViT-{size}/{p}": dict(patch_size=p, **fields, final_conv=True)
        for size, fields in SMALL.items()
        for p in (1, 2, 4, 8, 16)
    },
}


class Block(nn.Module):
    """Pre-norm transformer block; with `skip`, the joined long skip is projected down first.
    `options` and `first` are for `Attention` too.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        *,
        skip: bool = False,
        options: BlockOptions | None = None,
        first: bool = False,
    ) -> None:
        super().__init__()
        options = options or BlockOptions()
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None
        self.norm1 = learned_norm(options.norm, hidden_size)
        self.attn = Attention(hidden_size, num_heads, qkv_bias, options=options, first=first)
        self.norm2 = learned_norm(options.norm, hidden_size)
        self.mlp = feed_forward(options, hidden_size, int(hidden_size * mlp_ratio))

    def forward(
        self, x: Tensor, skip: Tensor | None = None, **told: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, L, D] -> [B, L, D], and the values that `Attention` gives away; skip [B, L, D] is
        joined where the block has room for it; what is told as `Attention` takes it.
        """
        if self.skip_linear is not None:
            assert skip is not None
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        attended, values = self.attn(self.norm1(x), **told)
        x = x + attended
        x = x + self.mlp(self.norm2(x))
        return x if values is None else (x, values)


ALIASES: dict[str, str] = {
    "cifar10_uvit_small": "U-ViT-S/2",
    "celeba64_uvit_small": "U-ViT-S/4",
    "imagenet64_uvit_mid": "U-ViT-M/4",
    "imagenet64_uvit_large": "U-ViT-L/4",
    "imagenet256_uvit_large": "U-ViT-L/2",
    "imagenet256_uvit_huge": "U-ViT-H/2",
    "imagenet512_uvit_large": "U-ViT-L/4",
    "imagenet512_uvit_huge": "U-ViT-H/4",
    "mscoco_uvit_small": "U-ViT-S/2-T2I",
}


@family("uvit", SIZES, ALIASES, options=BlockOptions)
class UViT(nn.Module):
    """A transformer over [label,] time [, context] and patch tokens, with long skips from its first
    half to its second.

    Args:
        shape: (C, H, W) of the input; H and W must divide by patch_size.
        num_classes: 0 is unconditional. Otherwise the label table has one more row, the null class
            `num_classes`.
        patch_size: side of a patch.
        hidden_size: width of a token; must divide by num_heads.
        depth: depth // 2 blocks, one middle block, depth // 2 blocks with skips.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over hidden_size.
        qkv_bias: a bias in the qkv projection.
        skip: long skip connections.
        mlp_time_embed: Linear-SiLU-Linear on the time sinusoids.
        final_conv: a 3x3 convolution over the output image.
        null_class: the label table has the row of the null class; the published ImageNet-64 models
            lack it.
        context_tokens: tokens of a text encoder, which then take the place of labels (0: none).
        context_width: width of such a token.
        sparse: a part for sparse training: a mixer of all tokens before the blocks, a fusion around
            the middle ones, or a decoder of all tokens behind them.
        sparse_depth: blocks of the mixer or decoder; of a fusion, the dense blocks at either end.
        sparse_width: width of a mixer's or decoder's tokens; null: hidden_size.
        sparse_heads: attention heads of a mixer or decoder; null: num_heads.
        interval_embed: the length of a step is embedded beside the time, for few steps (MeanFlow).
        velocity_head: a second output, of the velocity itself, for training only (improved
            MeanFlow).

    What `BlockOptions` declares are further arguments.

    Raises UsageError when the dimensions do not fit.
    """

    mixer: Any
    fusion: Any
    decoder: Any
    places: Tensor | None

    fills: ClassVar = frozenset({"none", "own"})
    published_objective: ClassVar = None

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
        null_class: bool = True,
        context_tokens: int = 0,
        context_width: int = 768,
        sparse: parts.Sparse = "none",
        sparse_depth: int = 2,
        sparse_width: int | None = None,
        sparse_heads: int | None = None,
        interval_embed: bool = False,
        velocity_head: bool = False,
        **blocks: Any,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.grid = check_patches(height, width, patch_size)
        _check_heads(hidden_size, num_heads, context_tokens, num_classes)
        self.patch_size = patch_size
        self.num_classes, self.null_class = num_classes, null_class
        self.hidden_size = hidden_size
        self.context_tokens = context_tokens
        self.gradient_checkpointing = False
        self.block_options = options = BlockOptions(**blocks)

        self.patch_embed: Any = self._make_patch_embed(channels)
        self.time_embed = _time_mlp(hidden_size) if mlp_time_embed else nn.Identity()
        self.label_emb = (
            nn.Embedding(num_classes + null_class, hidden_size) if num_classes else None
        )
        self.context_embed = nn.Linear(context_width, hidden_size) if context_tokens else None
        self.pos_embed = nn.Parameter(
            torch.empty(1, len(self.special_tokens) + self._patch_tokens(), hidden_size)
        )

        def block(width: int, heads: int, options: BlockOptions = options, **more: bool) -> Block:
            return Block(width, heads, mlp_ratio, qkv_bias, options=options, **more)

        self._make_trunk(depth // 2, functools.partial(block, hidden_size, num_heads), skip)
        size = (sparse_width or hidden_size, sparse_heads or num_heads, sparse_depth)
        light = parts.Light(*size, block=functools.partial(block, options=options.light()))
        self._attach(sparse, light)
        self.norm = learned_norm(options.norm, self.last_width)
        self.to_output: Any = self._make_to_output(channels)
        self.final_conv = nn.Conv2d(channels, channels, 3, padding=1) if final_conv else None
        self.interval_embed = IntervalEmbed(hidden_size, hidden_size) if interval_embed else None
        self.velocity_head = self._make_to_output(channels) if velocity_head else None
        self.initialise()
        parts.initialise(self)

    def _make_trunk(self, half: int, block: Callable[..., Block], skip: bool) -> None:
        """`half` blocks, the middle one, and `half` that the early ones' outputs join."""
        self.in_blocks = nn.ModuleList(block(first=i == 0) for i in range(half))
        self.mid_block = block(first=not half)
        self.out_blocks = nn.ModuleList(block(skip=skip) for _ in range(half))
        joins = {half + 1 + i: half - 1 - i for i in range(half)}
        extras, options = len(self.special_tokens), self.block_options
        self.trunk = Trunk(2 * half + 1, joins, extras, remembers=options.value_residual)
        places = places_of(self.grid, extras) if options.rope else None
        self.register_buffer("places", places, persistent=False)

    def _attach(self, sparse: parts.Sparse, light: parts.Light) -> None:
        """Add the part for sparse training; behind a decoder the tokens have its width."""
        into, self.last_width = None, self.hidden_size
        if sparse == "decoder":
            width = self.hidden_size
            norm = learned_norm(self.block_options.norm, width)
            into = nn.Sequential(norm, nn.Linear(width, light.width))
            self.last_width = light.width
        parts.attach(self, sparse, light, into)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The tokens in front of the patches, in the order of their rows in `pos_embed`."""
        if self.label_emb is not None:
            return ("label", "time")
        return ("time", *["context"] * self.context_tokens)

    def _patch_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def _make_patch_embed(self, channels: int) -> nn.Module:
        return nn.Linear(self.patch_size**2 * channels, self.hidden_size)

    def _make_to_output(self, channels: int) -> nn.Module:
        return nn.Linear(self.last_width, self.patch_size**2 * channels)

    def initialise(self) -> None:
        """Truncated normal(0.02) for linear weights and positions, zero biases.

        The patch embedding and the label table keep torch's own initialisation, as the published
        networks do.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        kept = set(self.patch_embed.modules())
        for module in self.modules():
            if isinstance(module, nn.Linear) and module not in kept:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.interval_embed is not None:
            self.interval_embed.initialise()

    def trunk_blocks(self) -> list[nn.Module]:
        """The network's own blocks in its order, without those for sparse training."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor | None = None,
        route: Route | None = None,
        *,
        interval: Tensor | None = None,
        velocity: bool = False,
    ) -> Any:
        """Predict from x [B, C, H, W] at network time t [B] and labels [B] (None: the null class).

        With context tokens, the condition is the text's features [B, tokens, width] and cannot be
        left out. Returns an image [B, C, H, W]; of a route whose gaps nothing fills the predictions
        of the kept patches [B, K, p*p*C], in the order of its ids. The final convolution, where
        there is one, then sees zeros in place of hidden patches. A network with `interval_embed`
        predicts for the interval [B] below t, None is 0; `velocity` asks for a pair, of which the
        second comes from the velocity head.
        """
        # Special tokens, then patches: those that the route hides from the start are not embedded.
        extras = len(self.special_tokens)
        special = self._special(x, t, condition, interval) + self.pos_embed[:, :extras]
        patches = self._embed(x, self.pos_embed[:, extras:], route)
        tokens = torch.cat([special, patches], 1)  # [B, extras + L or K, D]

        way = Pass(self)

        def run(block: nn.Module, z: Tensor) -> Tensor:
            return Pass(self).run(block, z)

        if self.mixer is not None:
            tokens = self.mixer(tokens, run)

        # Blocks, the late ones joined with the outputs of the early ones.
        blocks = self.trunk_blocks()

        def step(number: int, z: Tensor, skip: Tensor | None, ids: Tensor | None) -> Tensor:
            return way.run(blocks[number], z, skip, ids=ids)

        def fill(before: Tensor, kept: Tensor) -> Tensor:
            if self.fusion is not None:
                return self.fusion(self.trunk, before, kept, route or Route())
            if self.decoder is not None:
                return self.decoder(self.trunk, self.decoder.into(kept), route or Route(), run)
            return own_only(self.trunk, route, before, kept)

        tokens = self.trunk.run(tokens, route, step, fill)

        # Patches out.
        last = self.norm(tokens[:, extras:])  # [B, L or K, D]
        out = self._predict(last, route)
        if not velocity:
            return out
        assert self.velocity_head is not None
        return out, self._arranged(self.velocity_head(last), route)

    def _embed(self, x: Tensor, position: Tensor, route: Route | None) -> Tensor:
        """x [B, C, H, W] and the patches' positions [1, L, D] -> tokens [B, L or K, D]."""
        patches = patchify(x, self.patch_size)  # [B, L, p*p*C]
        if self.trunk.early(route):
            assert route is not None
            assert route.keep is not None
            patches = gather_tokens(patches, route.keep)
            position = gather_tokens(position, route.keep)
        return self.patch_embed(patches) + position

    def _predict(self, tokens: Tensor, route: Route | None) -> Tensor:
        """Normed patch tokens [B, L or K, D] -> what `forward` returns."""
        return self._arranged(self.to_output(tokens), route)

    def _arranged(self, out: Tensor, route: Route | None) -> Tensor:
        """Patch vectors [B, L or K, p*p*C] -> an image, or the kept patches."""
        if not partial(route):
            image = unpatchify(out, self.patch_size, self.grid)
            return self.final_conv(image) if self.final_conv is not None else image
        if self.final_conv is not None:
            assert route is not None
            assert route.keep is not None
            place = route.keep.unsqueeze(-1).expand_as(out)
            canvas = out.new_zeros(len(out), self.grid[0] * self.grid[1], out.shape[-1])
            canvas = canvas.scatter(1, place, out)
            image = self.final_conv(unpatchify(canvas, self.patch_size, self.grid))
            out = gather_tokens(patchify(image, self.patch_size), route.keep)
        return out

    def _special(self, x: Tensor, t: Tensor, y: Tensor | None, interval: Tensor | None) -> Tensor:
        sinusoids = timestep_embedding(t, self.hidden_size).to(self.pos_embed.dtype)
        time = add_interval(self.interval_embed, self.time_embed(sinusoids), interval)[:, None]
        if self.context_embed is not None:
            if y is None:
                raise UsageError(
                    "this network draws from text: give it the text encoder's features"
                )
            return torch.cat([time, self.context_embed(y)], dim=1)
        if self.label_emb is None:
            return time
        y = class_or_null(self, y, len(x), x.device)
        return torch.cat([self.label_emb(y)[:, None], time], dim=1)


def _time_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


def _check_heads(hidden_size: int, num_heads: int, context_tokens: int, num_classes: int) -> None:
    if hidden_size % num_heads:
        raise UsageError(
            f"model.hidden_size {hidden_size} does not divide by model.num_heads {num_heads}"
        )
    if context_tokens and num_classes:
        raise UsageError(
            "a network with model.context_tokens has no labels: set model.num_classes=0, not "
            f"{num_classes}"
        )
