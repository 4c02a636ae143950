"""Mean and covariance of features, gathered batch by batch in float64, and their `.npz` files."""

from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import msmdiff
from msmdiff.core import files, zips
from msmdiff.core.errors import MsmdiffError, UsageError
from msmdiff.core.metrics.frechet import Gaussian
from msmdiff.core.metrics.inception import INCEPTION_SHA256

SETTINGS = ("features", "resize", "precision", "image_size", "crop")
"""What two sets must share to be compared: network and weights, resizing rule, arithmetic, images'
size, crop.
"""

RECORDED = (*SETTINGS, "alpha")
"""What is kept beside statistics; `alpha` (what became of transparency) is told, not compared."""


@dataclass
class Statistics:
    """What one set of images is, to the metrics.

    `pooled` is the Gaussian of the features, `spatial` that of sFID's; `count` is 0 where a file
    does not say; `settings` are those of RECORDED that are known, `assumed` from the layout where a
    file does not state them; `rows` are the features, float32 [N, D], where they were kept.
    """

    pooled: Gaussian
    count: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    spatial: Gaussian | None = None
    rows: Tensor | None = None
    assumed: bool = False

    @property
    def width(self) -> int:
        return len(self.pooled.mean)


class Moments:
    """Streaming first and second moments (Chan et al. 1983): no more memory than one batch and the
    sums.

    With `keep_rows`, or while they are no more than `width`, the features are kept too: 4 bytes
    times images times width.
    """

    def __init__(
        self, width: int, device: torch.device | str = "cpu", keep_rows: bool = False
    ) -> None:
        self.count, self._keep_rows = 0, keep_rows
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._rows: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Take in a batch [B, D]."""
        x = features.to(self._mean.device, torch.float64)
        total = self.count + len(x)
        step = x.mean(0) - self._mean
        between = step[None] * (self.count * len(x) / total) ** 0.5
        centred = torch.cat([x - x.mean(0), between])
        self._scatter.addmm_(centred.T, centred)
        self._mean += step * (len(x) / total)
        self.count = total
        if self._keep_rows or total <= len(self._mean):
            self._rows.append(features.float().cpu())
        else:
            self._rows = []

    def finish(self) -> tuple[Gaussian, Tensor | None]:
        """The Gaussian, and the features where they were kept; of all processes together where
        there are several.

        Raises MsmdiffError for fewer than two images, which have no covariance.
        """
        width, device = len(self._mean), self._mean.device
        rows = torch.cat([*self._rows, torch.empty(0, width)])
        if dist.is_initialized():
            rows = self._gather(rows)
        if self.count < 2:
            raise MsmdiffError(
                "a Fréchet distance needs at least two images on each side; one side has "
                f"{self.count}"
            )
        few = self.count <= width
        root = (rows.to(device) - self._mean) / (self.count - 1) ** 0.5 if few else None
        gaussian = Gaussian(self._mean, self._scatter / (self.count - 1), root)
        return gaussian, rows if few or self._keep_rows else None

    def _gather(self, rows: Tensor) -> Tensor:
        """Bring the moments of all processes together, and the features where they are kept."""
        width, device, rank = len(self._mean), self._mean.device, dist.get_rank()
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
        counts[rank] = self.count
        dist.all_reduce(counts)
        total, before = int(counts.sum()), int(counts[:rank].sum())

        mean = self._mean * (self.count / max(1, total))
        dist.all_reduce(mean)
        apart = self._mean - mean
        self._scatter.addr_(apart, apart, alpha=self.count)
        dist.all_reduce(self._scatter)
        if self._keep_rows or total <= width:
            every = torch.zeros(total, width, device=device)
            every[before : before + self.count] = rows.to(device)
            dist.all_reduce(every)
            rows = every.cpu()
        self.count, self._mean = total, mean
        return rows


def differences(a: dict[str, str], b: dict[str, str]) -> list[str]:
    """In which settings that both state two sets differ, in words. Averages over areas do not ask
    for one size.
    """
    names = [name for name in SETTINGS if name != "image_size" or a.get("resize") != "area"]
    return [
        f"{name} {a[name]} against {b[name]}"
        for name in names
        if name in a and a[name] != b.get(name, a[name])
    ]


def save(path: Path, statistics: Statistics) -> None:
    """Write pytorch-fid's layout (`mu`, `sigma`) and ADM's (`mu_s`, `sigma_s`), with the count and
    settings beside.

    The features go in as `rows` where they were kept.
    """
    content: dict = {
        "count": statistics.count,
        "msmdiff": msmdiff.__version__,
        **statistics.settings,
    }
    for gaussian, suffix in ((statistics.pooled, ""), (statistics.spatial, "_s")):
        if gaussian is not None:
            content |= {
                f"mu{suffix}": gaussian.mean.cpu().numpy(),
                f"sigma{suffix}": gaussian.cov.cpu().numpy(),
            }
    if statistics.rows is not None:
        content["rows"] = statistics.rows.numpy()
    with files.atomic(path) as part, part.open("wb") as file:
        np.savez(file, **content)


def load(path: Path) -> Statistics | None:
    """Read `mu` and `sigma` from an `.npz`, or None when it holds none (but, say, images).

    A file of 2048 features that does not say how it was made is taken for ADM's where it holds
    `mu_s`, else for pytorch-fid's. Raises MsmdiffError for a file that is not a NumPy archive, and
    UsageError for numbers that are not a mean and a covariance.
    """
    with files.reading(path, "a NumPy archive"):
        found = _read(path)
    if found is None:
        return None
    gaussians = [_gaussian(path, found[f"mu{s}"], found[f"sigma{s}"]) for s in _suffixes(found)]
    pooled = gaussians[0]
    spatial = gaussians[1] if len(gaussians) > 1 else None
    with files.reading(path, "an archive of statistics"):
        count = int(found["count"]) if "count" in found else 0
    settings = {name: str(found[name]) for name in RECORDED if name in found}
    assumed = "features" not in settings and len(pooled.mean) == 2048
    if assumed:
        rule = "adm" if spatial is not None else "pytorch-fid"
        settings |= {"features": f"inception-2048/{INCEPTION_SHA256}", "resize": rule}
    rows = _rows(path, found["rows"], len(pooled.mean)) if "rows" in found else None
    if rows is not None and len(rows) <= rows.shape[1]:
        pooled = Gaussian.fit(rows)
    return Statistics(
        pooled=pooled,
        count=count,
        settings=settings,
        spatial=spatial,
        rows=rows,
        assumed=assumed,
    )


def _suffixes(names: Container[str]) -> tuple[str, ...]:
    """After `mu` and `sigma`: of the pooled features, and of the spatial ones where there are."""
    return ("", "_s") if "mu_s" in names and "sigma_s" in names else ("",)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays that statistics consist of, without the images that may lie beside them."""
    there = zips.names_in(path)
    if "mu" not in there or "sigma" not in there:
        return None
    means = [f"{name}{suffix}" for suffix in _suffixes(there) for name in ("mu", "sigma")]
    found = zips.read_arrays(path, [*means, "count", "rows", *RECORDED])
    with files.reading(path, "a file of statistics"):
        return found | {name: found[name].astype(np.float64) for name in means}


def ours(path: Path) -> bool:
    """Whether `save` wrote a file."""
    try:
        return {"mu", "sigma", "msmdiff"} <= set(zips.names_in(path))
    except MsmdiffError:
        return False


def _gaussian(path: Path, mean: np.ndarray, cov: np.ndarray) -> Gaussian:
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UsageError(
            f"{path}: mu {list(mean.shape)} and sigma {list(cov.shape)} do not belong together"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UsageError(f"{path} holds numbers that are not finite")
    # Files in single precision are symmetric and positive to seven digits only.
    if np.abs(cov - cov.T).max(initial=0) > 1e-4 * np.abs(cov).max(initial=0):
        raise UsageError(f"{path}: sigma is not symmetric, as a covariance is")
    slack = 1e-6 * abs(cov.trace()) + 1e-12
    raised = torch.from_numpy(cov + slack * np.eye(len(cov)))
    if torch.linalg.cholesky_ex(raised).info:
        raise UsageError(f"{path}: sigma has negative variances, which no covariance has")
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(cov))


def _rows(path: Path, rows: np.ndarray, width: int) -> Tensor:
    if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != width or len(rows) < 2:
        raise UsageError(
            f"{path}: rows {list(rows.shape)} of {rows.dtype} are not two or more features of "
            f"{width} float32 each"
        )
    if not np.isfinite(rows).all():
        raise UsageError(f"{path} holds numbers that are not finite")
    return torch.from_numpy(rows)
