"""The figures of a comparison: means with intervals, speeds from pairs of slices, and how unsteady
the machine was.
"""

import math
import statistics as averages
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats


@dataclass
class Turn:
    """One slice: whose, in which round, its steps and its seconds.

    `piece` numbers the kinds of step of an arm, over its stages and the ratios of a changing mask;
    -1 where a slice saw two of them.
    """

    arm: str
    seed: int
    round: int
    piece: int
    steps: int
    seconds: float
    flops: float


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * averages.stdev(values) / math.sqrt(len(values))
    mean = averages.fmean(values)
    return mean - half, mean + half


def summed_up(values: Sequence[float]) -> dict[str, Any]:
    """Keys `values`, `mean` and `interval`."""
    return {
        "values": list(values),
        "mean": averages.fmean(values),
        "interval": interval(values),
    }


def speed(turns: Sequence[Turn], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Arm -> how many steps a second it takes for one of the first arm: median, lowest and highest
    tenth of the ratios within one round. Rounds in which both took their first kind of step count.
    """
    paces: dict[tuple[int, int], dict[str, float]] = {}
    for turn in turns:
        if turn.piece == 0 and turn.seconds > 0:
            paces.setdefault((turn.seed, turn.round), {})[turn.arm] = turn.steps / turn.seconds
    found: dict[str, dict[str, float]] = {}
    for name in names[1:]:
        ratios = [p[name] / p[names[0]] for p in paces.values() if name in p and names[0] in p]
        if ratios:
            low, middle, high = _quantiles(ratios)
            found[name] = {"median": middle, "low": low, "high": high, "pairs": len(ratios)}
    return found


def unsteadiness(turns: Sequence[Turn]) -> float:
    """How much longer a step took in the slowest tenth of turns than in the median one, each beside
    the median of its own kind: 0.1 is ten per cent.
    """
    kinds: dict[tuple[str, int], list[float]] = {}
    for turn in turns:
        if turn.piece >= 0:
            kinds.setdefault((turn.arm, turn.piece), []).append(turn.seconds / turn.steps)
    relative = [t / averages.median(times) for times in kinds.values() for t in times]
    return _quantiles(relative)[2] - 1 if relative else 0.0


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    found = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    )
    low, middle, high = found.tolist()
    return low, middle, high
