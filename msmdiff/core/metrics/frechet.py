"""The Fréchet distance between Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017), without a
matrix root.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Gaussian:
    """A Gaussian fitted to features: float64 mean [D] and cov [D, D], which divides by n - 1.

    `root` is [n, D] with cov = root' root, the centred features over sqrt(n - 1), where they are no
    more than D.
    """

    mean: Tensor
    cov: Tensor
    root: Tensor | None = None

    @classmethod
    def fit(cls, features: Tensor) -> "Gaussian":
        """Of features [N, D], on their device."""
        mean = features.double().mean(0)
        root = (features.double() - mean) / (len(features) - 1) ** 0.5
        return cls(mean, root.T @ root, root if len(root) <= len(mean) else None)


def frechet_distance(a: Gaussian, b: Gaussian, device: torch.device | str = "cpu") -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64 on `device`. Never negative.

    With C1 = R1' R1 and C2 = R2' R2 the root's trace is the sum of the singular values of R1 R2',
    exact also for fewer samples than dimensions, or of the roots of the eigenvalues of the
    symmetric R1 C2 R1', which needs one factor only.
    """
    if a.root is None and b.root is not None:
        a, b = b, a
    if a.root is None:
        values, vectors = torch.linalg.eigh(a.cov.to(device))
        root = (vectors * values.clamp(min=0).sqrt()).T
    else:
        root = a.root.to(device)
    if b.root is not None:
        overlap = torch.linalg.svdvals(root @ b.root.to(device).T).sum()
    else:
        product = root @ b.cov.to(device) @ root.T
        overlap = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    apart = (a.mean.cpu() - b.mean.cpu()).square().sum() + a.cov.trace().cpu() + b.cov.trace().cpu()
    return max(0.0, float(apart - 2 * overlap.cpu()))
