"""The condition: what a network is told beside time. Nothing, classes, or the features of a text.

Its values y are None, int64 [B], or float [B, tokens, width]. Each form knows its null, which is
what a network is told in order to be unconditional: in training for a share of the images, in
sampling as what guidance leads away from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from msmdiff.core.errors import UsageError, nearest
from msmdiff.core.sections import ModelConfig
from msmdiff.core.seeding import numpy_stream, parse_range


class Condition(Protocol):
    """One form.

    Attributes:
        count: how many classes there are, else 0.
        guidable: whether there is a null to guide away from; `why_not_guided` else says why.
    """

    count: int
    why_not_guided: str

    @property
    def guidable(self) -> bool: ...

    def nulls(self, y: Tensor) -> Tensor:
        """The null for every row of y."""

    def values(self, wanted: Sequence[int | str] | Tensor | None) -> Tensor | None:
        """What a user gave, a value for each image -> y. Raises UsageError for what has no use."""

    def deal(self, wish: str | None, seeds: Sequence[int]) -> Tensor | None:
        """y for seeds: each by the seed alone, or None where values do not go by seeds."""

    def example(self, batch: int, device: torch.device | str) -> Tensor | None:
        """Some y, to count and to time with. A text without a null gets one of zeros, too, so that
        labels can be dropped; never ask it of a condition that trains or samples.
        """


def drop(condition: Condition, y: Tensor, dropped: Tensor) -> Tensor:
    """y with the null in the rows where dropped [B] is true."""
    return torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), condition.nulls(y), y)


@dataclass
class Unconditional:
    """Nothing."""

    count = 0
    guidable = False
    why_not_guided = "this network is unconditional: it takes no classes and no cfg scale"

    def nulls(self, y: Tensor) -> Tensor:
        raise UsageError(self.why_not_guided)

    def values(self, wanted: Sequence[int | str] | Tensor | None) -> None:
        if wanted is not None:
            raise UsageError(self.why_not_guided)

    def deal(self, wish: str | None, seeds: Sequence[int]) -> None:
        return None

    def example(self, batch: int, device: torch.device | str) -> None:
        return None


@dataclass
class Classes:
    """One of `count` classes; the null class, where there is one, is number `count`.

    `names` and `counts` are those of the data, as far as they are known: what the classes are
    called, and how many images each has.
    """

    count: int
    guidable: bool = True
    names: Sequence[str] = ()
    counts: Sequence[int] = ()
    why_not_guided = (
        "this network has no null class to guide away from: set the scale to 1, or give a --guide"
    )

    def nulls(self, y: Tensor) -> Tensor:
        return torch.full_like(y, self.count)

    def values(self, wanted: Sequence[int | str] | Tensor | None) -> Tensor | None:
        if wanted is None:
            return None
        if not isinstance(wanted, Tensor):
            wanted = [self.index(w, "classes") if isinstance(w, str) else w for w in wanted]
        y = torch.as_tensor(wanted)
        if y.is_floating_point() or not ((y >= 0) & (y < self.count)).all():
            raise UsageError(f"classes must lie in 0..{self.count - 1}")
        return y

    def deal(self, wish: str | None, seeds: Sequence[int]) -> Tensor:
        """`3`, `0-9`, `0,4,7`, names, or `balanced` (all, as None) in turn; `random`, or `data`, in
        the proportions of the data.
        """
        if wish == "data":
            return self._as_in_the_data(seeds)
        if wish == "random":
            drawn = [int(numpy_stream(seed, "class").integers(self.count)) for seed in seeds]
            return torch.tensor(drawn, dtype=torch.int64)
        every = wish in (None, "balanced")
        dealt = list(range(self.count)) if every else self._wished(str(wish))
        if max(dealt) >= self.count:
            raise UsageError(f"--classes {wish}: the classes are 0 to {self.count - 1}")
        return torch.tensor([dealt[seed % len(dealt)] for seed in seeds], dtype=torch.int64)

    def index(self, name: str, option: str) -> int:
        """The number of a class by its name. Raises UsageError for none of that name."""
        if name in self.names:
            return list(self.names).index(name)
        if not self.names:
            raise UsageError(f"{option} {name}: these weights do not name their classes: give 0-9")
        raise UsageError(f"{option} {name}: no such class{nearest(name, list(self.names))}; "
                         f"the classes are {', '.join(self.names[:20])}")  # fmt: skip

    def _wished(self, wish: str) -> list[int]:
        """Numbers, ranges and names between commas."""
        if wish in self.names and not wish.isdecimal():
            return [self.index(wish, "--classes")]  # a name may hold a comma
        found: list[int] = []
        for part in wish.split(","):
            number = all(c.isdecimal() or c in "- " for c in part)
            found += parse_range(part, "--classes") if number else [
                self.index(part.strip(), "--classes")
            ]  # fmt: skip
        return found

    def _as_in_the_data(self, seeds: Sequence[int]) -> Tensor:
        if not sum(self.counts):
            raise UsageError(
                "--classes data: these weights do not say how many images of each class there were"
            )
        ends = np.cumsum(self.counts)
        drawn = [int(numpy_stream(seed, "class").integers(ends[-1])) for seed in seeds]
        return torch.from_numpy(np.searchsorted(ends, drawn, side="right").astype(np.int64))

    def example(self, batch: int, device: torch.device | str) -> Tensor:
        return torch.zeros(batch, dtype=torch.long, device=device)


@dataclass
class Text:
    """The features of a text, [tokens, width]; `null` are those of the empty one, once known."""

    tokens: int
    width: int
    null: Tensor | None = None
    count = 0
    why_not_guided = "guidance of text needs the features of the empty text"

    @property
    def guidable(self) -> bool:
        return self.null is not None

    def nulls(self, y: Tensor) -> Tensor:
        if self.null is None:
            raise UsageError(self.why_not_guided)
        return self.null.to(y).expand_as(y)

    def values(self, wanted: Sequence[int | str] | Tensor | None) -> Tensor | None:
        if wanted is None:
            return None
        if not isinstance(wanted, Tensor) or not wanted.is_floating_point():
            raise UsageError("this network draws from text: it takes features, not classes")
        return wanted.float()

    def deal(self, wish: str | None, seeds: Sequence[int]) -> None:
        return None

    def example(self, batch: int, device: torch.device | str) -> Tensor:
        if self.null is None:
            self.null = torch.zeros(self.tokens, self.width, device=device)
        return torch.zeros(batch, self.tokens, self.width, device=device)


def describe(condition: Condition, names: Sequence[str], counts: Sequence[int]) -> None:
    """Tell a condition what the data call its classes, and how many images each has; more names
    than classes say nothing.
    """
    if isinstance(condition, Classes) and len(names) <= condition.count:
        condition.names = list(names)
        missing = condition.count - len(counts)
        condition.counts = [*counts, *[0] * missing] if counts and missing >= 0 else []


def of(model: ModelConfig) -> Condition:
    """The condition of the network that a resolved `model` section describes."""
    fields = model.model_dump()
    if fields.get("context_tokens"):
        return Text(fields["context_tokens"], fields["context_width"])
    if fields["num_classes"]:
        return Classes(int(fields["num_classes"]), fields.get("null_class") is not False)
    return Unconditional()


def text_shape(model: ModelConfig) -> tuple[int, int] | None:
    """(tokens, width) of the text features that a network draws from, or None."""
    condition = of(model)
    return (condition.tokens, condition.width) if isinstance(condition, Text) else None
