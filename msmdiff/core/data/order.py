"""Which image when: the endless training sequence as a pure function of the seed.

Position k of the sequence is image `permutation(epoch k // N)[k % N]`. A training step takes the
next batch_size positions; micro-batches cut them into chunks, dealt round the processes. A chunk is
known by its first position, which also keys its noise, times and masks.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from msmdiff.core.seeding import numpy_stream


@lru_cache(maxsize=2)
def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    return numpy_stream(seed, "order", epoch).permutation(count)


def images_at(seed: int, count: int, positions: Sequence[int]) -> np.ndarray:
    """The indices, int64, of the images at positions of the sequence over `count` images."""
    epochs, places = np.divmod(np.asarray(positions), count)
    indices = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        indices[chosen] = _permutation(seed, count, int(epoch))[places[chosen]]
    return indices


class Chunks:
    """The chunks of one process from `images_seen` on, without end: lists of positions, for a
    DataLoader.

    Args:
        images_seen: where to start, a multiple of batch_size.
        batch_size: images per optimiser step over all processes.
        micro_batch_size: images per chunk.
        rank, world: this process and how many there are.
    """

    def __init__(
        self,
        images_seen: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images_seen, self.batch_size, self.micro = images_seen, batch_size, micro_batch_size
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        start = self.images_seen
        while True:
            for first in range(
                start + self.rank * self.micro, start + self.batch_size, self.world * self.micro
            ):
                yield list(range(first, first + self.micro))
            start += self.batch_size
