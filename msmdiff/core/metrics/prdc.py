"""Improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al.
2020), tile by tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 4096
"""Rows and columns of distances held at once: 64 MiB, whatever the number of images."""


def prdc(
    samples: Tensor,
    reference: Tensor,
    k: int = 3,
    k_density: int = 5,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Shares of two feature sets [M, D] and [N, D] in each other's manifolds: unions of balls to
    the k-th neighbour.

    precision: samples in the reference's; recall: references in the samples'. density: by how many
    of the reference's balls a sample is held, over `k_density`; coverage: references whose ball
    holds a sample; those balls reach to the `k_density`-th neighbour. A neighbour is never the
    image itself; k is lowered where there are not so many.
    """
    # Smaller numbers lose less in |a|^2 + |b|^2 - 2 a.b.
    mean = reference.double().mean(0).to(reference.dtype)
    samples, reference = samples - mean, reference - mean
    farthest = max(k, k_density)
    own = nearest(reference, None, farthest, device)[0]  # [N, farthest], squared
    others = nearest(samples, None, farthest, device)[0]  # [M, farthest]
    radii = own[:, min(k, own.shape[1]) - 1]  # [N]
    k_density = min(k_density, own.shape[1])
    density_radii = own[:, k_density - 1]  # [N]
    sample_radii = others[:, min(k, others.shape[1]) - 1]  # [M]

    precise = torch.zeros(len(samples), dtype=torch.bool)
    held = torch.zeros(len(samples))
    recalled = torch.zeros(len(reference), dtype=torch.bool)
    covered = torch.zeros(len(reference), dtype=torch.bool)
    for rows, columns, distances in _tiles(samples, reference, device):
        within = distances <= density_radii[columns].to(device)
        precise[rows] |= (distances <= radii[columns].to(device)).any(1).cpu()
        recalled[columns] |= (distances <= sample_radii[rows, None].to(device)).any(0).cpu()
        held[rows] += within.sum(1).cpu()
        covered[columns] |= within.any(0).cpu()
    found = {
        "precision": precise,
        "recall": recalled,
        "density": held / k_density,
        "coverage": covered,
    }
    return {name: float(values.double().mean()) for name, values in found.items()}


def nearest(
    x: Tensor, y: Tensor | None, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Squared distances [N, k], rising, and indices [N, k], of the k nearest of y to every row of
    x.

    Without y: of x itself, each row's own entry left out. k is lowered where there are not so many.
    """
    among = x if y is None else y
    k = min(k, len(among) - (y is None))
    best = torch.full((len(x), k), torch.inf, dtype=x.dtype)
    where = torch.zeros(len(x), k, dtype=torch.int64)
    for rows, columns, distances in _tiles(x, among, device):
        if y is None and rows == columns:
            distances.fill_diagonal_(torch.inf)
        index = torch.arange(columns.start, columns.stop, device=device).expand_as(distances)
        lowest = torch.cat([best[rows].to(device), distances], 1).topk(k, largest=False)
        best[rows] = lowest.values.cpu()
        where[rows] = torch.cat([where[rows].to(device), index], 1).gather(1, lowest.indices).cpu()
    return best, where


def _tiles(
    x: Tensor, y: Tensor, device: torch.device | str
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Slices of x's rows and of y's, with their squared distances [rows, columns]."""
    for rows in _slices(len(x)):
        for columns in _slices(len(y)):
            a, b = x[rows].to(device), y[columns].to(device)
            squares = a.square().sum(1)[:, None] + b.square().sum(1)
            yield rows, columns, torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def _slices(n: int) -> list[slice]:
    return [slice(start, min(start + TILE, n)) for start in range(0, n, TILE)]
