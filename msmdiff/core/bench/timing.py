"""Timing done right: warm-up, synchronisation, medians, turns; and what a machine can multiply."""

import functools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Work = Callable[[], object]
Shape = tuple[int, int, int, int]
"""Of a matrix product: (batch, m, k, n)."""


def synchronise(device: torch.device) -> None:
    """Wait for what is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def each_second(work: Work, device: torch.device, steps: int, warmup: int) -> list[float]:
    """Seconds of each of `steps` calls, after `warmup` others."""
    times = []
    for _ in range(warmup + steps):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return times[warmup:]


def median_seconds(work: Work, device: torch.device, steps: int, warmup: int) -> float:
    return statistics.median(each_second(work, device, steps, warmup))


# ------------------------------------------------------------------ two settings in turns


@dataclass
class Pairs:
    """Two settings, timed in alternation.

    Attributes:
        first, second: median seconds of a call in each slice.
    """

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """How many times as fast the first is, pair by pair."""
        return [b / a for a, b in zip(self.first, self.second, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Keys `ratios`, `median`, `low` and `high` (quartiles), `pairs`, and the seconds."""
        ratios = self.ratios
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        return {
            "ratios": ratios,
            "median": statistics.median(ratios),
            "low": low,
            "high": high,
            "pairs": len(ratios),
            "first_seconds": self.first,
            "second_seconds": self.second,
        }


def alternate(
    first: Work, second: Work, device: torch.device, pairs: int, calls: int, warmup: int = 2
) -> Pairs:
    """Time two settings in `pairs` of slices of `calls`, so that whatever else the machine does
    hits both.

    Which of a pair comes first changes from pair to pair: a steady drift favours neither.
    """
    for work in (first, second):
        each_second(work, device, 0, warmup)
    found = Pairs()
    turns = [(first, found.first), (second, found.second)]
    for number in range(pairs):
        for work, times in turns if number % 2 == 0 else reversed(turns):
            # The first call of a slice finds the other's data in the caches.
            times.append(median_seconds(work, device, calls, warmup=1))
    return found


# ------------------------------------------------------------------ where the time goes


class Clock:
    """Adds up the seconds of named parts.

    Args:
        device: what is waited for before and after each part.

    Attributes:
        seconds: by part, since the last `start`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def start(self) -> None:
        self.seconds.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        started = time.perf_counter()
        yield
        synchronise(self.device)
        self.seconds[name] += time.perf_counter() - started


class Watched:
    """Stands for an object of whose methods some are timed; everything else is its own.

    Args:
        inner: the object.
        clock: takes the times.
        parts: names of methods -> what their time is called.
    """

    def __init__(self, inner: Any, clock: Clock, **parts: str) -> None:
        self._inner, self._clock, self._parts = inner, clock, parts

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._timed(found, self._parts[name]) if name in self._parts else found

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        # Python looks a call up in the class, never through __getattr__.
        return self._timed(self._inner, self._parts["__call__"])(*arguments, **options)

    def _timed(self, work: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(work, updated=())
        def timed(*arguments: Any, **options: Any) -> Any:
            with self._clock.part(part):
                return work(*arguments, **options)

        return timed


# ------------------------------------------------------------------ what a machine can multiply


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: what a step is measured against."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / median_seconds(lambda: a @ a, device, steps=5, warmup=2)


def products_peak(shapes: Counter[Shape], device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a network's own matrix products one after another, forward and backward.

    Raises ValueError where there are none.
    """
    if not shapes:
        raise ValueError("no matrix products")
    flops = seconds = 0.0
    for (batch, m, k, n), count in shapes.items():
        # out = x w, then the gradients of x and of w.
        for rows, inner, columns in ((m, k, n), (m, n, k), (k, m, n)):
            a = torch.randn(batch, rows, inner, device=device, dtype=dtype)
            b = torch.randn(batch, inner, columns, device=device, dtype=dtype)
            a, b = (a[0], b[0]) if batch == 1 else (a, b)
            work = functools.partial(torch.matmul, a, b)
            seconds += count * median_seconds(work, device, steps=3, warmup=1)
            flops += count * 2 * batch * m * k * n
    return flops / seconds


class Products(TorchDispatchMode):
    """Counts the matrix products of linear layers by their shapes; works on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[Shape] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        operands = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}
        if func in operands:
            a: Tensor
            b: Tensor
            a, b = args[operands[func] : operands[func] + 2]
            batch = a.shape[0] if a.ndim == 3 else 1
            self.shapes[batch, a.shape[-2], a.shape[-1], b.shape[-1]] += 1
        return func(*args, **(kwargs or {}))
