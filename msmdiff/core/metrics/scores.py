"""Inception Score and KID, from features."""

import numpy as np
import torch
from torch import Tensor

from msmdiff.core.seeding import numpy_stream


def inception_score(
    probabilities: Tensor, splits: int = 10, split_size: int | None = None
) -> tuple[float, float]:
    """exp of the mean KL divergence from the mean class distribution, per split: mean and
    population deviation.

    `probabilities` are [N, classes] in the order of the images; `splits` nearly equal parts
    (Salimans et al. 2016), or parts of `split_size`, the last one shorter (ADM's evaluator: 5000).
    """
    p = probabilities.double()
    n, splits = len(p), min(splits, len(p))
    parts = (
        p.split(split_size)
        if split_size
        else [p[i * n // splits : (i + 1) * n // splits] for i in range(splits)]
    )
    # xlogy: a probability of zero contributes nothing.
    divergence = [
        torch.xlogy(q, q).sum(1).mean() - torch.xlogy(q.mean(0), q.mean(0)).sum() for q in parts
    ]
    scores = torch.stack(divergence).exp()
    return float(scores.mean()), float(scores.std(correction=0))


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of [m, D] and [n, D] under (a.b / D + 1)^3 (Binkowski et al. 2018), in
    float64.
    """
    x, y = x.double(), y.double()
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    own = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return float(own[0] + own[1] - 2 * xy.mean())


def kid(
    x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Mean and population deviation of the MMD over random subsets of `size` (at most the smaller
    set's).
    """
    size, values = min(size, len(x), len(y)), []
    for number in range(subsets):
        rng = numpy_stream(0, "kid", number)
        one, two = (v[torch.from_numpy(rng.permutation(len(v))[:size])].to(device) for v in (x, y))
        values.append(polynomial_mmd(one, two))
    return float(np.mean(values)), float(np.std(values))
