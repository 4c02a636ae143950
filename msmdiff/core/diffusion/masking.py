"""Which tokens the network sees: index tensors `keep` [B, K], drawn on the device, K the same for
every batch.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from msmdiff.core.config import MaskConfig
from msmdiff.core.errors import UsageError


class Mask:
    """Draws the kept tokens of a height x width grid.

    Args:
        grid: (height, width) in tokens.
        ratio: share of hidden tokens, 0 <= ratio < 1.
        kind: `patch` hides single tokens, `block` aligned block x block squares, `crop` all but one
            window.
        block: side of a block; must divide both sides of the grid.
        crop: side of the visible window; None takes the square whose area is nearest to 1 - ratio
            of the grid.
        rounding: patch only. `nearest` keeps max(1, round(L (1 - ratio))) of L tokens; `floor`
            hides int(ratio L), which is the MaskDM code's rule and the one `block` always follows:
            int(ratio L) // block^2 blocks.

    Raises UsageError when a block does not divide the grid or nothing would stay visible.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        ratio: float,
        kind: Literal["patch", "block", "crop"] = "patch",
        block: int = 4,
        crop: int | None = None,
        rounding: Literal["nearest", "floor"] = "nearest",
    ) -> None:
        height, width = grid
        tokens = height * width
        self.grid, self.kind = grid, kind
        # Units are what is hidden or kept as one: tokens (a block of side 1) or blocks.
        self.block = block if kind == "block" else 1
        if height % self.block or width % self.block:
            near = [b for b in range(1, min(grid) + 1) if height % b == 0 and width % b == 0]
            raise UsageError(
                f"mask.block {block} does not divide the {height}x{width} token grid; use "
                f"one of {near}"
            )
        self.units = tokens // self.block**2
        self.window = 0
        if kind == "crop":
            self.window = crop or max(1, round(math.sqrt(tokens * (1 - ratio))))
            if self.window > min(grid):
                raise UsageError(
                    f"mask.crop {self.window} is larger than the {height}x{width} token grid"
                )
            self.kept = self.window**2
        elif kind == "block" or rounding == "floor":
            self.kept = tokens - int(ratio * tokens) // self.block**2 * self.block**2
        else:
            self.kept = max(1, round(tokens * (1 - ratio)))
        if self.kept < 1:
            raise UsageError(
                f"mask.ratio {ratio} hides every token of the {height}x{width} grid; lower it"
            )

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def effective_ratio(self) -> float:
        """The share of tokens that really is hidden."""
        return 1 - self.kept / self.tokens

    def draw(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """keep [batch, K] int64, ascending, on the generator's device; None where nothing is
        hidden.
        """
        if self.kept == self.tokens:
            return None
        device, (height, width) = generator.device, self.grid
        if self.kind == "crop":
            top = torch.randint(
                height - self.window + 1, (batch, 1, 1), generator=generator, device=device
            )
            left = torch.randint(
                width - self.window + 1, (batch, 1, 1), generator=generator, device=device
            )
            side = torch.arange(self.window, device=device)
            return ((top + side[:, None]) * width + left + side).flatten(1)
        scores = torch.rand(batch, self.units, generator=generator, device=device)
        units = scores.topk(self.kept // self.block**2, dim=1, sorted=False).indices
        if self.block > 1:
            per_row, side = width // self.block, torch.arange(self.block, device=device)
            rows = (units // per_row * self.block)[..., None, None] + side[:, None]
            columns = (units % per_row * self.block)[..., None, None] + side
            units = (rows * width + columns).flatten(1)
        return units.sort(dim=1).values


def build(config: MaskConfig, grid: tuple[int, int]) -> Mask:
    """The mask a configuration asks for, on a grid of tokens."""
    if config.ratio == 0 and not (config.kind == "crop" and config.crop):
        return Mask(grid, 0.0)
    return Mask(grid, config.ratio, config.kind, config.block, config.crop, config.rounding)


def mdt_kept(tokens: int, ratio: float, extra: float | None = None, spread: float = 0.2) -> int:
    """How many tokens MDT keeps. MDTv2 draws `extra` from [0, 1) for each pass and hides `spread`
    of it more.
    """
    if extra is None:
        return int(tokens * (1 - ratio))
    hidden = ratio + spread * torch.tensor(
        extra, dtype=torch.float32
    )  # float32 like the published code: it truncates
    return int(tokens * (1 - hidden))
