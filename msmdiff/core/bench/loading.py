"""`bench data`: how fast images are read, and whether a network would have to wait for them."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from msmdiff.core.data.loader import TrainingImages, batches, default_workers
from msmdiff.core.data.order import Chunks
from msmdiff.core.data.source import Source
from msmdiff.core.sections import DataConfig


@dataclass
class Loaded:
    """Reading, measured.

    Attributes:
        first_s: until the first batch is there.
        images_per_s: as fast as they come, after it.
        workers: processes that decode; 0: the training's own.
        waited: the share of a training's time that it would wait for images, whose steps take
            `step_ms`; None where none was given.
    """

    first_s: float
    images_per_s: float
    workers: int
    waited: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    source: Source, config: DataConfig, batch_size: int, seconds: float, step_ms: float | None
) -> Loaded:
    """Read for so many seconds the way training does; then again beside steps of `step_ms`."""
    dataset = TrainingImages(source, config, seed=0)
    workers = config.workers
    if workers is None:
        workers = 0 if dataset.cached else default_workers()
    stream = batches(dataset, Chunks(0, batch_size, batch_size), pin_memory=False)
    started = time.perf_counter()
    next(stream)
    first = time.perf_counter() - started
    read, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        next(stream)
        read += batch_size
    speed = read / (time.perf_counter() - started)
    waited = None if step_ms is None else _waited(stream, seconds, step_ms / 1000)
    return Loaded(first, speed, workers, waited)


def _waited(stream: Any, seconds: float, step: float) -> float:
    """The share of the time for which the next batch was not there yet."""
    waiting, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        asked = time.perf_counter()
        next(stream)
        waiting += time.perf_counter() - asked
        time.sleep(step)  # the network, on another device
    return waiting / (time.perf_counter() - started)
