"""DiT (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers"), and JiT, a DiT of large
pixel patches (Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise").
"""

import functools
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from msmdiff.core.backbones import sparse as parts
from msmdiff.core.backbones.adaln import (
    TIME_WIDTH,
    AdaLNTransformer,
    Amm,
    Block,
    FinalLayer,
    check_width,
)
from msmdiff.core.backbones.blocks import BlockOptions, places_of
from msmdiff.core.backbones.family import family
from msmdiff.core.backbones.interval import IntervalEmbed
from msmdiff.core.backbones.layers import gather_tokens, patchify, sincos_table, unpatchify
from msmdiff.core.backbones.routes import (
    Pass,
    Route,
    Trunk,
    class_or_null,
    own_only,
    partial,
)
from msmdiff.core.errors import UsageError

WIDTHS = {  # of DiT and of MDT
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}
SMALL = {  # of ours, to learn in minutes: 0.5, 2.2 and 9.8 M parameters
    "N": dict(hidden_size=64, depth=6, num_heads=4),
    "XXS": dict(hidden_size=128, depth=7, num_heads=4),
    "XS": dict(hidden_size=256, depth=8, num_heads=8),
}
SIZES: dict[str, dict] = {
    f"DiT-{size}/{p}": dict(patch_size=p, **fields, learn_sigma=True)
    for size, fields in WIDTHS.items()
    for p in (2, 4, 8)
}
SIZES |= {f"DiT-{n}/{p}": dict(patch_size=p, **SMALL[n]) for n in SMALL for p in (1, 2, 4, 8, 16)}

JIT_BLOCKS = dict(norm="rms", qk_norm=True, mlp="swiglu", rope=True)
JIT_WIDTHS: dict[str, dict] = {
    "B": dict(hidden_size=768, depth=12, num_heads=12, bottleneck=128, class_tokens_at=4),
    "L": dict(hidden_size=1024, depth=24, num_heads=16, bottleneck=128, class_tokens_at=8),
    "H": dict(hidden_size=1280, depth=32, num_heads=16, bottleneck=256, class_tokens_at=10),
}
SIZES |= {
    f"JiT-{size}/{p}": dict(patch_size=p, **fields, class_tokens=32, **JIT_BLOCKS)
    for size, fields in JIT_WIDTHS.items()
    for p in (16, 32)
}


@family("dit", SIZES, options=BlockOptions)
class DiT(AdaLNTransformer):
    """A transformer over patch tokens, with fixed positions.

    Args:
        shape: (C, H, W) of the input; H and W must divide by patch_size.
        num_classes: 0 is unconditional.
        patch_size: side of a patch.
        hidden_size: width of a token; must divide by num_heads and by 4.
        depth: blocks.
        num_heads: attention heads.
        mlp_ratio: inner width of the MLP over hidden_size.
        learn_sigma: predict the variance too.
        null_class: the label table has one more row, the null class; the default of every published
            network.
        amm: blocks whose attention EDT's matrix modulates while sampling: off, default, or their
            numbers.
        amm_formula: the matrix, `exp`, or `cos` as at 512 pixels.
        bottleneck: patches are projected to this width first, without bias, which suits large ones
            of pixels; 0: they are not.
        class_tokens: tokens with the label, and learned places of their own, that travel with the
            patches and are cut off at the end.
        class_tokens_at: the block before which these tokens join.
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
    # EDT's authors list them for XL, and in a comment for the 12 blocks of S.
    AMM: ClassVar = {12: [(0.0, [8, 10])], 28: [(0.0, [15, 17, 19, 22, 24])]}

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
        learn_sigma: bool = False,
        null_class: bool = True,
        amm: Amm = "off",
        amm_formula: Literal["exp", "cos"] = "exp",
        bottleneck: int = 0,
        class_tokens: int = 0,
        class_tokens_at: int = 0,
        sparse: parts.Sparse = "none",
        sparse_depth: int = 2,
        sparse_width: int | None = None,
        sparse_heads: int | None = None,
        interval_embed: bool = False,
        velocity_head: bool = False,
        **blocks: Any,
    ) -> None:
        options = BlockOptions(**blocks)
        check_width("model.hidden_size", hidden_size, num_heads)
        last_width = (sparse_width or hidden_size) if sparse == "decoder" else hidden_size
        super().__init__(
            shape=shape,
            num_classes=num_classes,
            patch_size=patch_size,
            hidden_size=hidden_size,
            last_width=last_width,
            learn_sigma=learn_sigma,
            null_class=null_class,
            norm=options.norm,
            bottleneck=bottleneck,
        )
        self.block_options = options
        self.pos_embed = nn.Parameter(sincos_table(self.grid, hidden_size), requires_grad=False)

        def block(width: int, heads: int, options: BlockOptions, first: bool = False) -> Block:
            return Block(width, heads, mlp_ratio, hidden_size, options=options, first=first)

        self.blocks = nn.ModuleList(
            block(hidden_size, num_heads, options, first=i == 0) for i in range(depth)
        )
        self._add_class_tokens(class_tokens, class_tokens_at)
        size = (sparse_width or hidden_size, sparse_heads or num_heads, sparse_depth)
        light = parts.Light(*size, block=functools.partial(block, options=options.light()))
        self._attach(sparse, light)
        self.interval_embed = IntervalEmbed(TIME_WIDTH, hidden_size) if interval_embed else None
        patch_width = patch_size**2 * shape[0]
        head = (last_width, patch_width, hidden_size, options.norm)
        self.velocity_head = FinalLayer(*head) if velocity_head else None
        self.initialise()
        parts.initialise(self)
        self.set_amm(amm, amm_formula)

    def _attach(self, sparse: parts.Sparse, light: parts.Light) -> None:
        """Add the part for sparse training."""
        width, norm = self.hidden_size, self.block_options.norm
        into = FinalLayer(width, light.width, width, norm) if sparse == "decoder" else None
        parts.attach(self, sparse, light, into)

    def _add_class_tokens(self, count: int, at: int) -> None:
        """Make the trunk for them; none is fine too. Raises UsageError where they cannot join."""
        depth, options = len(self.blocks), self.block_options
        if at and not count:
            raise UsageError(f"model.class_tokens_at {at} has no effect without model.class_tokens")
        if at >= depth:
            raise UsageError(
                f"model.class_tokens_at {at} must be the number of one of the {depth} blocks, "
                f"below {depth}"
            )
        if at and options.value_residual:
            raise UsageError(
                f"class tokens that join at block {at} (model.class_tokens_at) have no values of "
                "the first block for model.value_residual: let them join at 0, or leave that off"
            )
        self.special_tokens, self.class_tokens_at = ("class",) * count, at
        self.trunk = Trunk(depth, {}, count, remembers=options.value_residual)
        start = 0.02 * torch.randn(1, count, self.hidden_size) if count else None
        self.class_embed = None if start is None else nn.Parameter(start)
        places = places_of(self.grid, count) if options.rope else None
        self.register_buffer("places", places, persistent=False)

    def numbered_blocks(self) -> list[tuple[Any, tuple[int, int]]]:
        return [(block, self.grid) for block in self.blocks]

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

        Returns an image [B, C or 2C, H, W]; of a route whose gaps nothing fills the predictions of
        the kept patches, [B, K, p*p*(C or 2C)], in the order of its ids. A network with
        `interval_embed` predicts for the interval [B] below t, None is 0; `velocity` asks for a
        pair, of which the second comes from the velocity head.
        """
        # Patches in: those that the route hides from the start are not embedded.
        patches = patchify(x, self.patch_size)  # [B, L, p*p*C]
        position: Tensor = self.pos_embed  # [1, L, D]
        if self.trunk.early(route):
            assert route is not None
            assert route.keep is not None
            patches = gather_tokens(patches, route.keep)
            position = gather_tokens(position, route.keep)
        tokens = self.patch_embed(patches) + position  # [B, L or K, D]
        if self.class_embed is not None:
            tokens = torch.cat([self._class_tokens(x, condition), tokens], dim=1)
        extras = self.trunk.extras
        c = self.condition(x, t, condition, interval)  # [B, D]
        way = Pass(self)

        def run(block: nn.Module, z: Tensor) -> Tensor:
            return Pass(self).run(block, z, c)

        if self.mixer is not None:
            tokens = self.mixer(tokens, run)

        # Blocks.
        def step(number: int, z: Tensor, skip: Tensor | None, ids: Tensor | None) -> Tensor:
            waiting = extras if number < self.class_tokens_at else 0
            return way.run(self.blocks[number], z, c, None, ids, ids=ids, waiting=waiting)

        def fill(before: Tensor, kept: Tensor) -> Tensor:
            if self.fusion is not None:
                return self.fusion(self.trunk, before, kept, route or Route())
            if self.decoder is not None:
                return self.decoder(self.trunk, self.decoder.into(kept, c), route or Route(), run)
            return own_only(self.trunk, route, before, kept)

        tokens = self.trunk.run(tokens, route, step, fill)  # [B, E + L or K, D]

        # Patches out: [B, L or K, p*p*(C or 2C)].
        tokens = tokens[:, extras:]
        out = self._predict(self.final(tokens, c), route)
        if not velocity:
            return out
        assert self.velocity_head is not None
        return out, self._predict(self.velocity_head(tokens, c), route)

    def _predict(self, out: Tensor, route: Route | None) -> Tensor:
        """Patch vectors -> what `forward` returns."""
        return out if partial(route) else unpatchify(out, self.patch_size, self.grid)

    def _class_tokens(self, x: Tensor, y: Tensor | None) -> Tensor:
        """[B, E, D]: the label at every one of their places; without labels the places alone."""
        assert self.class_embed is not None
        tokens = self.class_embed.expand(len(x), -1, -1)
        if self.label_emb is None:
            return tokens
        return tokens + self.label_emb(class_or_null(self, y, len(x), x.device))[:, None]
