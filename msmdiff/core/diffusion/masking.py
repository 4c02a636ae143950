"""Which tokens a pass lets through: ids `keep` [B, K], drawn on the device, K the same for every
batch. A new kind of mask is one class, registered with its options.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from msmdiff.core import registry
from msmdiff.core.errors import UsageError
from msmdiff.core.registry import Options, register
from msmdiff.core.sections import MaskConfig


class Mask(ABC):
    """Draws the kept tokens of a grid of (height, width) tokens.

    `kept` is how many they are. Raises UsageError where nothing would stay visible.
    """

    def __init__(self, grid: tuple[int, int], kept: int) -> None:
        self.grid, self.kept = grid, kept
        if kept < 1:
            raise UsageError(
                f"mask.ratio hides every token of the {grid[0]}x{grid[1]} grid; lower it"
            )

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def effective_ratio(self) -> float:
        """The share of tokens that really is hidden."""
        return 1 - self.kept / self.tokens

    def draw(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """keep [batch, K] int64, ascending, on the generator's device; None where all are kept."""
        return None if self.kept == self.tokens else self.chosen(batch, generator)

    @abstractmethod
    def chosen(self, batch: int, generator: torch.Generator) -> Tensor:
        """keep [batch, K] int64, ascending."""


class PatchOptions(Options):
    rounding: Literal["nearest", "floor"] = Field(
        "nearest",
        description="How the number of kept tokens is rounded: to the nearest, or down as in the "
        "MaskDM code.",
    )


@register("mask", "patch", PatchOptions)
class PatchMask(Mask):
    """Single tokens.

    `nearest` keeps max(1, round(L (1 - ratio))) of L tokens; `floor` hides int(ratio L).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        ratio: float,
        *,
        rounding: Literal["nearest", "floor"] = "nearest",
    ) -> None:
        tokens = grid[0] * grid[1]
        nearest = max(1, round(tokens * (1 - ratio)))
        super().__init__(grid, nearest if rounding == "nearest" else tokens - int(ratio * tokens))

    def chosen(self, batch: int, generator: torch.Generator) -> Tensor:
        return _subset(batch, self.tokens, self.kept, generator).sort(dim=1).values


class BlockOptions(Options):
    block: int = Field(4, ge=1, description="The side of a block, in tokens.")


@register("mask", "block", BlockOptions)
class BlockMask(Mask):
    """Aligned squares of block x block tokens, of which int(ratio L) // block^2 are hidden."""

    def __init__(self, grid: tuple[int, int], ratio: float, *, block: int = 4) -> None:
        height, width = grid
        _require_division("mask.block", block, grid)
        tokens, self.block = height * width, block
        super().__init__(grid, tokens - int(ratio * tokens) // block**2 * block**2)

    def chosen(self, batch: int, generator: torch.Generator) -> Tensor:
        width, area = self.grid[1], self.block**2
        blocks = _subset(batch, self.tokens // area, self.kept // area, generator)
        per_row, side = width // self.block, torch.arange(self.block, device=generator.device)
        rows = (blocks // per_row * self.block)[..., None, None] + side[:, None]
        columns = (blocks % per_row * self.block)[..., None, None] + side
        return (rows * width + columns).flatten(1).sort(dim=1).values


class CellOptions(Options):
    cell: int = Field(2, ge=1, description="The side of a cell, in tokens.")


@register("mask", "cell", CellOptions)
class CellMask(Mask):
    """The same number of random tokens of every cell x cell square, round(cell^2 (1 - ratio))
    (SPRINT: one of each 2 x 2).
    """

    def __init__(self, grid: tuple[int, int], ratio: float, *, cell: int = 2) -> None:
        height, width = grid
        _require_division("mask.cell", cell, grid)
        self.cell, self.of_each = cell, max(1, round(cell**2 * (1 - ratio)))
        super().__init__(grid, height * width // cell**2 * self.of_each)

    def chosen(self, batch: int, generator: torch.Generator) -> Tensor:
        device, (height, width), cell = generator.device, self.grid, self.cell
        cells = (height // cell) * (width // cell)
        scores = torch.rand(batch, cells, cell**2, generator=generator, device=device)
        inside = scores.topk(self.of_each, dim=2, sorted=False).indices  # [B, cells, K of each]
        number = torch.arange(cells, device=device)[:, None]
        rows = number // (width // cell) * cell + inside // cell
        columns = number % (width // cell) * cell + inside % cell
        return (rows * width + columns).flatten(1).sort(dim=1).values


class CropOptions(Options):
    crop: int | None = Field(
        None,
        ge=1,
        description="The side of the visible window, in tokens; null derives it from the ratio.",
    )


@register("mask", "crop", CropOptions)
class CropMask(Mask):
    """All but one square window, by default of the area nearest to 1 - ratio of the grid."""

    def __init__(self, grid: tuple[int, int], ratio: float, *, crop: int | None = None) -> None:
        height, width = grid
        self.window = crop or max(1, round(math.sqrt(height * width * (1 - ratio))))
        if self.window > min(grid):
            raise UsageError(
                f"mask.crop {self.window} is larger than the {height}x{width} token grid"
            )
        super().__init__(grid, self.window**2)

    def chosen(self, batch: int, generator: torch.Generator) -> Tensor:
        device, (height, width) = generator.device, self.grid
        shape = (batch, 1, 1)
        top = torch.randint(height - self.window + 1, shape, generator=generator, device=device)
        left = torch.randint(width - self.window + 1, shape, generator=generator, device=device)
        side = torch.arange(self.window, device=device)
        return ((top + side[:, None]) * width + left + side).flatten(1)


def _require_division(option: str, side: int, grid: tuple[int, int]) -> None:
    """Raises UsageError, with the sides that do, unless squares of this side fill the grid."""
    height, width = grid
    if height % side or width % side:
        near = [b for b in range(1, min(grid) + 1) if height % b == 0 and width % b == 0]
        raise UsageError(
            f"{option} {side} does not divide the {height}x{width} token grid; use one of {near}"
        )


def _subset(batch: int, units: int, kept: int, generator: torch.Generator) -> Tensor:
    """`kept` of so many units for each image, [batch, kept], in no order."""
    scores = torch.rand(batch, units, generator=generator, device=generator.device)
    return scores.topk(kept, dim=1, sorted=False).indices


def hides(config: MaskConfig) -> bool:
    """Whether a `mask` section hides anything."""
    return bool(config.ratio or (config.kind == "crop" and getattr(config, "crop", None)))


def over_training(config: MaskConfig) -> list[tuple[float, float]]:
    """The ratios of a training: (share of its images from which, ratio), rising from 0.

    They are few, so that a compiled network meets few numbers of tokens. Raises UsageError for
    stages that do not rise, or are missing.
    """
    if config.schedule == "steps":
        stages = [(float(start), float(ratio)) for start, ratio in config.stages or []]
        starts = [start for start, _ in stages]
        fit = all(0 <= start < 1 and 0 <= ratio < 1 for start, ratio in stages)
        if not stages or starts[0] != 0 or starts != sorted(set(starts)) or not fit:
            raise UsageError(
                f"mask.stages {config.stages} must be pairs of a share of the training, rising "
                "from 0, and a ratio below 1, such as [[0, 0.9], [0.6, 0.5]]"
            )
    elif config.schedule == "constant":
        stages = [(0.0, config.ratio)]
    else:
        stages = [_between(config, i) for i in range(config.levels)]
    if config.tail:
        stages = [(start, ratio) for start, ratio in stages if start < 1 - config.tail]
        stages.append((1 - config.tail, 0.0))
    return stages


def _between(config: MaskConfig, i: int) -> tuple[float, float]:
    """Piece i of a linear or cosine schedule."""
    passed = i / (config.levels - 1)
    if config.schedule == "cosine":
        passed = (1 - math.cos(math.pi * passed)) / 2
    ratio = config.ratio + passed * (config.final_ratio - config.ratio)
    return i / config.levels * (1 - config.tail), ratio


def build(config: MaskConfig, grid: tuple[int, int]) -> Mask:
    """The mask a configuration asks for, on a grid of tokens."""
    if not hides(config):
        return PatchMask(grid, 0.0)
    entry = registry.find("mask", config.kind, "mask.kind")
    options: dict[str, Any] = entry.takes(config)
    return entry.make(grid, config.ratio, **options)


def mdt_kept(tokens: int, ratio: float, extra: float | None = None, spread: float = 0.2) -> int:
    """How many tokens MDT keeps. MDTv2 draws `extra` from [0, 1) for each pass and hides `spread`
    of it more.
    """
    if extra is None:
        return int(tokens * (1 - ratio))
    # float32 like the published code: it truncates
    hidden = ratio + spread * torch.tensor(extra, dtype=torch.float32, device="cpu")
    return int(tokens * (1 - hidden))
