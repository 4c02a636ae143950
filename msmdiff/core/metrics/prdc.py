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
    mean = (
        reference.double().mean(0).to(reference.dtype)
    )  # smaller numbers lose less in |a|^2 + |b|^2 - 2 a.b
    samples, reference = samples - mean, reference - mean
    own, others = (nearest(x, None, max(k, k_density), device)[0] for x in (reference, samples))
    k, k_density, k_others = (
        min(each, x.shape[1]) for each, x in ((k, own), (k_density, own), (k, others))
    )
    precise, held = torch.zeros(len(samples), dtype=torch.bool), torch.zeros(len(samples))
    recalled, covered = torch.zeros(2, len(reference), dtype=torch.bool)
    for rows, columns, distances in _tiles(samples, reference, device):
        within = distances <= own[columns, k_density - 1].to(device)
        precise[rows] |= (distances <= own[columns, k - 1].to(device)).any(1).cpu()
        recalled[columns] |= (distances <= others[rows, k_others - 1, None].to(device)).any(0).cpu()
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
    best, where = (
        torch.full((len(x), k), torch.inf, dtype=x.dtype),
        torch.zeros(len(x), k, dtype=torch.int64),
    )
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
    for rows in (slice(i, min(i + TILE, len(x))) for i in range(0, len(x), TILE)):
        for columns in (slice(i, min(i + TILE, len(y))) for i in range(0, len(y), TILE)):
            a, b = x[rows].to(device), y[columns].to(device)
            squares = a.square().sum(1)[:, None] + b.square().sum(1)
            yield rows, columns, torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)
