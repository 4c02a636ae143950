"""Random numbers without state.

Every draw names what it is for: a stream is a pure function of (seed, purpose, position). Nothing
depends on what was drawn before, so a run that is stopped and resumed draws the same numbers as one
that was not, and a second process never needs the first one's generator.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from msmdiff.core.errors import UsageError


def key(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit number that depends on every argument."""
    text = repr((seed, purpose, *position)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stream(device: torch.device | str, seed: int, purpose: str, *position: int) -> torch.Generator:
    """A fresh torch generator on `device` for one purpose at one position."""
    return torch.Generator(device).manual_seed(key(seed, purpose, *position))


def numpy_stream(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A fresh NumPy generator for one purpose at one position."""
    return np.random.Generator(np.random.Philox(key(seed, purpose, *position)))


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on `device`, without waiting for it."""
    # From pageable memory the copy would wait for what a GPU is doing.
    if device.type == "cuda" and drawn.device.type == "cpu":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


class SeedNoise:
    """Gaussian noise in which every image of a batch has a generator of its own, so that one seed
    is one image.

    Calling it gives the next [B, *shape] float32 noise on `device`. Sample i depends on `seeds[i]`
    and on the number of calls only, never on the rest of the batch. The numbers are drawn on the
    CPU: a seed means the same noise on every device.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str
    ) -> None:
        self._draws = [_draw_of(int(seed)) for seed in seeds]
        self._shape = shape
        self._device = device

    def __call__(self) -> Tensor:
        # From pageable memory the copy would wait for the device.
        pinned = torch.device(self._device).type == "cuda"
        noise = torch.empty(len(self._draws), *self._shape, pin_memory=pinned)
        for row, draw in zip(noise, self._draws, strict=True):
            draw(row)
        return noise.to(self._device, non_blocking=True)


def _draw_of(seed: int) -> Callable[[Tensor], object]:
    """Fills a tensor with the next noise of a seed.

    The seed itself, not a hash: hashes of 50,000 seeds may collide in the 32 bits that torch's CPU
    generator keeps. Larger seeds would lose their upper bits there, and are keys of Philox.
    """
    if seed < 2**32:
        generator = torch.Generator().manual_seed(seed)
        return lambda row: row.normal_(generator=generator)
    wide = np.random.Generator(np.random.Philox(key=seed))
    return lambda row: row.copy_(torch.from_numpy(wide.standard_normal(row.shape, np.float32)))


# ------------------------------------------------------------------ ranges as users write them

MOST = 10_000_000
"""Numbers that a range may stand for: they are written out."""


def parse_range(text: str, option: str) -> list[int]:
    """`7`, `0-9`, `0,4,7` or a mixture -> integers. Raises UsageError naming the option."""
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span:
                raise ValueError
            if span.stop > 2**63 or span.stop - span.start > MOST - len(numbers):
                raise UsageError(
                    f"{option} {part[:60]}: give numbers below 2^63, and at most {MOST:,} of them"
                )
            numbers.extend(span)
    except ValueError:
        problem = "write a number, a rising range such as 0-9, or a list such as 0,4,7"
        raise UsageError(f"{option} {text}: {problem}") from None
    return numbers


def spans(seeds: Iterable[int]) -> str:
    """[0, 1, 2, 7] -> "0-2,7": what `parse_range` reads."""
    ends: list[list[int]] = []
    for seed in sorted(set(seeds)):
        if ends and seed == ends[-1][1] + 1:
            ends[-1][1] = seed
        else:
            ends.append([seed, seed])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)
