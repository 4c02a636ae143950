"""How tokens travel through the blocks of a network, and the one trunk that runs them so."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from msmdiff.core.backbones.layers import gather_tokens
from msmdiff.core.errors import UsageError


@dataclass
class Route:
    """What one pass lets through.

    Attributes:
        keep: ids [B, K] of the tokens that are let through; None lets everyone through.
        enter, leave: blocks enter..leave-1 see the kept tokens only; leave None is behind the last.
        fill: what stands in the gaps from `leave` on: `none` nothing (only behind the last block),
            `own` the tokens' own values from before `enter`, `mask` a token of the network's,
            `side` MDT's side-interpolater.
        scored: where the loss counts.
        dropped: images whose way through enter..leave-1 is replaced by mask tokens (SPRINT's path
            drop), bool [B]; True drops it for all, and computes none of those blocks.
    """

    keep: Tensor | None = None
    enter: int = 0
    leave: int | None = None
    fill: Literal["none", "own", "mask", "side"] = "none"
    scored: Literal["kept", "all"] = "kept"
    dropped: Tensor | bool = False

    @property
    def early(self) -> bool:
        """Whether hidden tokens are never asked for: their patches need not be embedded."""
        return self.keep is not None and self.enter == 0 and self.fill == "none"


@dataclass
class Hidden:
    """What a block made of a batch: the tokens of the patches [B, L or K, D], and the ids [B, K] of
    these where they are not all.
    """

    tokens: Tensor
    keep: Tensor | None


Fill = Callable[[Tensor, Tensor], Tensor]
"""(tokens from before `enter` [B, E + L, D], kept tokens [B, E + K, D]) -> all tokens."""


Step = Callable[[int, Tensor, Tensor | None, Tensor | None], Tensor]
"""One block of a network: (its number, tokens [B, E + L or K, D], the skip that joins it, the ids
of the tokens where they are not all) -> tokens of the same shape."""


@dataclass
class Trunk:
    """The blocks of a network in their order.

    Attributes:
        depth: how many there are.
        joins: long skips: number of a block -> the earlier one whose output joins its input.
        extras: tokens in front of the patches, which always travel.
        meets: (enter, leave) of the network's own fusion or decoder: there `fill` makes all tokens
            out of those from before `enter` and those that arrive, on every pass.
        mixes: all tokens have gone through blocks before these, whatever is hidden here.
        remembers: blocks ask for what the first one made of every token that they see.
    """

    depth: int
    joins: Mapping[int, int]
    extras: int = 0
    meets: tuple[int, int] | None = None
    mixes: bool = False
    remembers: bool = False
    _watched: frozenset[int] = frozenset()
    _hidden: dict[int, Hidden] = field(default_factory=dict)

    @contextmanager
    def watching(self, behind: Iterable[int]) -> Iterator[dict[int, Hidden]]:
        """Inside, the tokens behind so many blocks are kept of every pass: number of blocks ->
        tokens.
        """
        self._watched, self._hidden = frozenset(behind), {}
        try:
            yield self._hidden
        finally:
            self._watched, self._hidden = frozenset(), {}

    def early(self, route: Route | None) -> bool:
        """Whether the network may leave the hidden patches out from the start."""
        return route is not None and route.early and not self.mixes

    def run(self, tokens: Tensor, route: Route | None, step: Step, fill: Fill) -> Tensor:
        """Run all blocks along a route.

        tokens [B, E + L, D], of an `early` pass [B, E + K, D]; what comes back has all tokens
        unless nothing fills the gaps. Without a route this is the plain pass, to the last bit.

        Raises UsageError for a route that does not suit these blocks.
        """
        route = route or Route()
        keep = route.keep
        enter, leave = self._span(route)
        narrow = self.early(route)
        before = tokens
        remembered: dict[int, Tensor] = {}
        wanted = set(self.joins.values())
        for number in range(self.depth):
            if number == enter and not narrow:
                before, narrow = tokens, keep is not None
                tokens = self.narrowed(tokens, keep)
            if number == leave:
                tokens, narrow = fill(before, tokens), False
            if route.dropped is True and enter <= number < leave:
                continue  # what would arrive is replaced by mask tokens
            skip = remembered.pop(self.joins[number]) if number in self.joins else None
            tokens = step(number, tokens, skip, keep if narrow else None)
            if number + 1 in self._watched:
                seen = Hidden(tokens[:, self.extras :], keep if narrow else None)
                self._hidden[number + 1] = seen
            if number in wanted:
                remembered[number] = tokens
        if leave == self.depth and (self.meets or (narrow and route.fill != "none")):
            tokens = fill(before, tokens)
        return tokens

    def narrowed(self, tokens: Tensor, keep: Tensor | None) -> Tensor:
        """[B or 1, E + L, D] -> [B, E + K, D]: the kept patches behind the special tokens."""
        if keep is None:
            return tokens
        if not self.extras:
            return gather_tokens(tokens, keep)
        special, patches = tokens[:, : self.extras], tokens[:, self.extras :]
        special = special.expand(len(keep), -1, -1)
        return torch.cat([special, gather_tokens(patches, keep)], dim=1)

    def own(self, before: Tensor, kept: Tensor, keep: Tensor) -> Tensor:
        """Kept tokens put back among their own earlier values: [B, E + L, D]."""
        special, patches = kept[:, : self.extras], kept[:, self.extras :]
        place = keep.unsqueeze(-1).expand_as(patches)
        everyone = before[:, self.extras :].to(patches.dtype).scatter(1, place, patches)
        return torch.cat([special, everyone], dim=1) if self.extras else everyone

    def symmetric_leave(self, enter: int, from_end: int) -> int:
        """Where a route that enters at `enter` leaves: so many blocks before the end, or where the
        long skips ask for it.
        """
        return max(self.joins) + 1 - enter if self.joins else self.depth - from_end

    def check(self, enter: int, leave: int, fill: str) -> None:
        """Raises UsageError for a route that does not suit these blocks."""
        if not 0 <= enter < leave <= self.depth:
            raise UsageError(
                f"a route from block {enter} to {leave} does not fit {self.depth} blocks"
            )
        if fill == "none" and leave < self.depth:
            raise UsageError(
                f"a route that leaves at block {leave} of {self.depth} needs a filling of its gaps"
            )
        if self.meets and ((enter, leave) != self.meets or fill != "mask"):
            raise UsageError(
                f"this network takes its tokens together from block {self.meets[0]} to "
                f"{self.meets[1]}, by its model.sparse: a route from {enter} to {leave} with fill "
                f"'{fill}' does not fit"
            )
        self.check_values(enter, leave)
        for late, early in self.joins.items():
            if (enter <= early < leave) != (enter <= late < leave):
                raise UsageError(
                    f"a route from block {enter} to {leave} cuts the long skip from block {early} "
                    f"to {late}: let it leave at {max(self.joins) + 1 - enter}"
                )

    def check_values(self, enter: int, leave: int) -> None:
        """Raises UsageError where tokens come back that the first block has not seen, and later
        ones ask for its values.
        """
        if self.remembers and enter == 0 and leave < self.depth:
            raise UsageError(
                f"a route from block 0 to {leave} hides tokens from the first block, whose values "
                "model.value_residual mixes into all: set mask.enter=1 or more, or "
                "model.value_residual=false"
            )

    def _span(self, route: Route) -> tuple[int, int]:
        if route.dropped is not False and not self.meets:
            raise UsageError("only a network of model.sparse 'fusion' can do without its middle")
        if route.keep is None:
            return self.meets or (self.depth, self.depth)
        leave = self.depth if route.leave is None else route.leave
        self.check(route.enter, leave, route.fill)
        return route.enter, leave


class Pass:
    """One pass of tokens through the blocks of a network, which are told where the tokens lie
    (`model.rope`) and what the first block's values were (`model.value_residual`).

    Args:
        network: with its `trunk`, and `places` [1, E + L, 2] or None.
    """

    def __init__(self, network: Any) -> None:
        self._network = network
        self._values: Tensor | None = None
        self._whose: Tensor | None = None  # the ids of the values' tokens; None: all

    def run(
        self,
        block: nn.Module,
        tokens: Tensor,
        *inputs: Tensor | None,
        ids: Tensor | None = None,
        waiting: int = 0,
    ) -> Tensor:
        """tokens [B, E + L or K, D] through one block, with its further inputs.

        Args:
            ids: [B, K] of the tokens, where they are not all.
            waiting: so many of the special tokens do not take part yet.
        """
        told = self._told(ids, waiting)
        aside, tokens = (tokens[:, :waiting], tokens[:, waiting:]) if waiting else (None, tokens)
        made: Any = run_block(self._network, block, tokens, *inputs, **told)
        if isinstance(made, tuple):
            made, self._values = made
            self._whose = ids
        return made if aside is None else torch.cat([aside.to(made.dtype), made], dim=1)

    def _told(self, ids: Tensor | None, waiting: int = 0) -> dict[str, Tensor]:
        """What a block is told of the tokens that take part."""
        network, told = self._network, {}
        if network.places is not None:
            told["places"] = network.trunk.narrowed(network.places, ids)[:, waiting:]
        if self._values is not None:
            same = ids is self._whose
            told["first_values"] = (
                self._values if same else network.trunk.narrowed(self._values, ids)
            )
        return told


def partial(route: Route | None) -> bool:
    """Whether the network answers with the kept patches instead of an image."""
    return route is not None and route.keep is not None and route.fill == "none"


def own_only(trunk: Trunk, route: Route | None, before: Tensor, kept: Tensor) -> Tensor:
    """The filling of networks that have no token of their own for it."""
    assert route is not None
    assert route.keep is not None
    if route.fill != "own":
        raise UsageError(f"this network has nothing to fill gaps with by '{route.fill}': use 'own'")
    return trunk.own(before, kept, route.keep)


BLOCK = "Block"
"""The class name of what a network repeats: compiled, sharded and checkpointed one by one."""


def blocks_of(network: nn.Module) -> list[Any]:
    """What a network repeats; of a plugin's network perhaps nothing of that name."""
    return [module for module in network.modules() if type(module).__name__ == BLOCK]


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Let torch.compile each block in place; names of parameters stay as they are.

    Blocks that are alike share one compiled graph, which takes seconds where a deep network as a
    whole takes minutes. `options` are torch.compile's.
    """
    for module in blocks_of(network) or [network]:
        module.compile(**options)


def checkpoint_blocks(network: Any, every: int) -> None:
    """Let every n-th block be computed again in the backward pass: 1 all, 0 none.

    A block that is computed again keeps its input only, and costs its forward pass once more.
    """
    network.gradient_checkpointing = every > 0
    for number, block in enumerate(blocks_of(network)):
        block.computed_again = every > 0 and number % every == 0


def run_block(network: Any, block: nn.Module, *inputs: Tensor | None, **told: Tensor) -> Tensor:
    """One block, computed again in the backward pass where `checkpoint_blocks` asked for it."""
    again = network.gradient_checkpointing and getattr(block, "computed_again", True)
    if again and torch.is_grad_enabled():
        return checkpoint(functools.partial(block, **told), *inputs, use_reentrant=False)
    return block(*inputs, **told)


def check_patches(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """The grid of patches. Raises UsageError where they do not divide the input."""
    if height % patch_size or width % patch_size:
        raise UsageError(
            f"model.patch_size {patch_size} does not divide the {height}x{width} input"
        )
    return height // patch_size, width // patch_size


def class_or_null(network: Any, y: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """Labels y [B], or the null class for everyone. Raises UsageError where there is none."""
    if y is not None:
        return y
    if not network.null_class:
        raise UsageError("this network has no null class (model.null_class=false): give it labels")
    return torch.full((batch,), network.num_classes, device=device)
