"""Averages of any width after a training, from its snapshots (Karras et al. 2024, section 3 and
appendix C).

An average of relative width s weights the weights after step k of t by a power of k. A run keeps
two such averages every so many steps. The best combination of these in the sense of least squares
is the average of another width: what they weight is known exactly, step by step.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msmdiff.core import tensor_files, weights
from msmdiff.core.config import Config
from msmdiff.core.errors import UsageError
from msmdiff.core.training import checkpoint

WIDEST = 0.28
"""A width of 1 / sqrt(12) = 0.2887 weights all steps alike."""

_AT_ONCE = 65_536
"""Steps whose weights are computed together."""


# ------------------------------------------------------------------ the mathematics


def exponent(width: float) -> float:
    """gamma of the profile k^gamma with this relative width, its standard deviation over t: the
    largest root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2 (there algorithm 2).
    """
    squared = width**-2
    roots = np.roots([1, 7, 16 - squared, 12 - squared])
    return float(roots.real[abs(roots.imag) < 1e-9].max())


def profile(step: int, gamma: float, steps: np.ndarray) -> np.ndarray:
    """What an average after `step` steps weights the weights after each of `steps` [K] with,
    float64: (k^a - (k - 1)^a) / step^a with a = gamma + 1, and nothing that comes later.
    """
    a = gamma + 1
    with np.errstate(divide="ignore"):  # the first step follows none
        share = -np.expm1(a * np.log1p(-1 / steps))
    return np.where(steps <= step, (steps / step) ** a * share, 0.0)


@dataclass(frozen=True)
class Solution:
    """Factors [N] float64 of averages, which sum to 1, and how far off the profile that they make
    is: the root of its summed squared error, over that of the wanted one.
    """

    factors: np.ndarray
    error: float


def solve(kept: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> Solution:
    """The averages of (step, gamma) that are kept -> their combination next to the wanted one."""
    ends = [*kept, wanted]
    inner = np.zeros((len(ends), len(ends)))
    for start in range(1, wanted[0] + 1, _AT_ONCE):
        steps = np.arange(start, min(start + _AT_ONCE, wanted[0] + 1), dtype=np.float64)
        rows = np.stack([profile(step, gamma, steps) for step, gamma in ends])
        inner += rows @ rows.T
    own, cross, size = inner[:-1, :-1], inner[:-1, -1], inner[-1, -1]
    ones = np.ones((len(kept), 1))
    system = np.block([[own, ones], [ones.T, np.zeros((1, 1))]])
    found = np.linalg.lstsq(system, np.append(cross, 1.0), rcond=None)[0][:-1]
    missed = found @ own @ found - 2 * found @ cross + size
    return Solution(found, float(np.sqrt(max(missed, 0.0) / size)))


# ------------------------------------------------------------------ snapshots


@dataclass(frozen=True)
class Snapshot:
    """A file with one average.

    Attributes:
        path, images: the file, and the images that were seen.
        step, width: the updates that the average had taken in, and its relative width.
    """

    path: Path
    images: int
    step: int
    width: float


def keep(
    run: Path,
    images_seen: int,
    updates: int,
    networks: dict[str, dict[str, Tensor]],
    config: Config,
    classes: tuple[Sequence[str], Sequence[int]],
) -> None:
    """Write a snapshot, a file `snapshots/img-NNNNNNNNN-width-W.safetensors` for each width.

    Each is whole or not there, and none is ever removed by a training that goes on. Raises
    MsmdiffError where one cannot be written.
    """
    notes = checkpoint.notes_of(config, images_seen, *classes)
    for width, tensors in networks.items():
        path = run / "snapshots" / f"img-{images_seen:09d}-width-{width}.safetensors"
        if not path.is_file():
            about = {**notes, "updates": str(updates), "width": width}
            weights.save(path, tensors, config, weights=f"width-{width}", **about)


def forget(run: Path, images_seen: int) -> None:
    """Remove the snapshots past so many images: the training is about to make them again."""
    for path in (run / "snapshots").glob("img-*.safetensors"):
        if _images_of(path) > images_seen:
            path.unlink()


def _images_of(path: Path) -> int:
    found = re.fullmatch(r"img-([0-9]+)-width-.*", path.stem)
    return int(found[1]) if found else -1


def run_of(source: str, runs: Path = Path("runs")) -> Path:
    """The run that a user means by its directory or its name. Raises UsageError for none."""
    places = [Path(source), runs / source]
    found = next((place for place in places if (place / "snapshots").is_dir()), None)
    found = found or next((place for place in places if place.is_dir()), None)
    if found is None:
        raise UsageError(f"'{source}' is no run, here or under {runs}/")
    return found


def snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run, in the order of training. Raises what reading one raises."""
    found = []
    for path in (run / "snapshots").glob("img-*-width-*.safetensors"):
        about = json.loads(tensor_files.metadata(path)["msmdiff"])
        found.append(
            Snapshot(path, int(about["images_seen"]), int(about["updates"]), float(about["width"]))
        )
    return sorted(found, key=lambda each: (each.images, each.width))


# ------------------------------------------------------------------ an average of another width


@dataclass(frozen=True)
class Combined:
    """An average made of snapshots.

    Attributes:
        tensors, config, notes: what goes into a weights file.
        images, used: where in the training it stands, and how many snapshots it is made of.
        error: see `Solution`.
    """

    tensors: dict[str, Tensor]
    config: Config
    notes: dict[str, Any]
    images: int
    used: int
    error: float


def combine(run: Path, width: float, images: int | None = None) -> Combined:
    """The average of a relative width after so many images, by default at the newest snapshot.

    Only snapshots up to there are used. Sums are of float64, on the CPU. Raises UsageError for a
    run without snapshots, images at which there is none, or a width out of range.
    """
    if not 0 < width <= WIDEST:
        raise UsageError(f"--width {width:g}: give a number above 0 and up to {WIDEST}")
    found = snapshots(run)
    if not found:
        raise UsageError(
            f"{run} has no snapshots: train it with --set ema.snapshots_every=500, or so"
        )
    at = found[-1].images if images is None else images
    last = next((each for each in found if each.images == at), None)
    if last is None:
        nearest = min({each.images for each in found}, key=lambda seen: abs(seen - at))
        raise UsageError(f"--images {at}: {run} has no snapshot there; the nearest is at {nearest}")
    kept = [each for each in found if each.images <= at]
    ends = [(each.step, exponent(each.width)) for each in kept]
    solution = solve(ends, (last.step, exponent(width)))
    stored = weights.read(last.path)
    return Combined(
        tensors=_summed(kept, solution.factors, stored.tensors),
        config=stored.config,
        notes={**stored.notes, "weights": f"width-{width:g} of {len(kept)} snapshots",
               "width": f"{width:g}"},
        images=at,
        used=len(kept),
        error=solution.error,
    )  # fmt: skip


def _summed(
    kept: Sequence[Snapshot], factors: np.ndarray, newest: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The weighted sum of snapshots, in the newest one's types; whole numbers are the newest's."""
    real = [name for name, value in newest.items() if value.is_floating_point()]
    sums = {name: torch.zeros(newest[name].shape, dtype=torch.float64) for name in real}
    for each, factor in zip(kept, factors.tolist(), strict=True):
        tensors = tensor_files.read(each.path)
        for name in real:
            sums[name] += factor * tensors[name].double()
    return {name: sums[name].to(newest[name].dtype) if name in sums else newest[name]
            for name in newest}  # fmt: skip
