"""The Fréchet distance between Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017), without a matrix root."""

import numpy as np
from scipy.linalg import eigh, eigvalsh


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) for means [D] and covariances [D, D].

    (C1 C2)^(1/2) has the trace of the root of the symmetric B' C2 B, where C1 = B B': its eigenvalues are real and
    found in float64, also for singular covariances. Never negative.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(v, np.float64) for v in (mean1, cov1, mean2, cov2))
    values, vectors = eigh(cov1)
    root = vectors * np.sqrt(values.clip(min=0))
    product = root.T @ cov2 @ root
    overlap = np.sqrt(eigvalsh((product + product.T) / 2).clip(min=0)).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * overlap
    return max(0.0, float(distance))
