"""Mean and covariance of features, gathered batch by batch in float64, and their `.npz` files."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msmdiff.core.errors import MsmdiffError, UsageError


@dataclass
class Statistics:
    """A Gaussian fitted to features.

    Attributes:
        mean, cov: [D] and [D, D] float64; cov divides by n - 1.
        count: how many images; 0 where a file does not say.
        features: under which features (and weights) they were taken; empty where a file does not say.
    """

    mean: np.ndarray
    cov: np.ndarray
    count: int = 0
    features: str = ""


class Moments:
    """Streaming first and second moments (Chan et al. 1983): no more memory than one batch and the sums."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))

    def add(self, features: np.ndarray) -> None:
        """Take in a batch [B, D]."""
        features = np.asarray(features, np.float64)
        mean = features.mean(0)
        centred = features - mean
        step = mean - self._mean
        total = self.count + len(features)
        self._scatter += centred.T @ centred + np.outer(step, step) * (self.count * len(features) / total)
        self._mean += step * (len(features) / total)
        self.count = total

    def statistics(self, features: str = "") -> Statistics:
        """The fitted Gaussian. Raises MsmdiffError for fewer than two images, which have no covariance."""
        if self.count < 2:
            raise MsmdiffError(f"a Fréchet distance needs at least two images on each side; one side has {self.count}")
        return Statistics(self._mean.copy(), self._scatter / (self.count - 1), self.count, features)


def save(path: Path, statistics: Statistics) -> None:
    """Write pytorch-fid's layout (`mu`, `sigma`), with the count and the features' name beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part.npz")
    np.savez(part, mu=statistics.mean, sigma=statistics.cov, count=statistics.count, features=statistics.features)
    part.replace(path)


def load(path: Path) -> Statistics | None:
    """Read `mu` and `sigma` from an `.npz`, or None when it holds none (but, say, images).

    Raises MsmdiffError for a file that is not a NumPy archive, and UsageError for shapes that do not belong together.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            if "mu" not in content or "sigma" not in content:
                return None
            mean, cov = content["mu"].astype(np.float64), content["sigma"].astype(np.float64)
            count = int(content["count"]) if "count" in content else 0
            features = str(content["features"]) if "features" in content else ""
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise MsmdiffError(f"{path} cannot be read as a NumPy archive: {error}") from None
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise UsageError(f"{path}: mu {list(mean.shape)} and sigma {list(cov.shape)} do not belong together")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UsageError(f"{path} holds numbers that are not finite")
    return Statistics(mean, cov, count, features)
