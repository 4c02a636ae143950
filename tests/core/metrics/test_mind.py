"""MIND against closed forms."""

import pytest
import torch

from msmdiff.core.metrics.mind import mind


def rows(n, seed, width=6):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_a_shift_counts_three_times_its_square():
    """Every projection moves by u . s, whose mean square is |s|^2 / d."""
    a, shift = rows(300, 0), torch.tensor([2.0, -1.0, 0.5, 0.0, 1.0, 3.0])
    assert mind(a, a) == 0
    assert mind(a, a + shift, 4000) == pytest.approx(3 * shift.square().sum().item(), rel=0.06)
    assert mind(a, a + 2 * shift) == pytest.approx(4 * mind(a, a + shift))


def test_a_scale_counts_by_the_spread():
    """Of N(0, 1) and N(0, 4) the sorted differences have mean square (2 - 1)^2 each."""
    a = rows(20_000, 1)
    assert mind(a, 2 * a) == pytest.approx(3 * 6 * a.square().mean().item(), rel=0.05)


def test_order_does_not_matter_and_sizes_may_differ():
    a, b = rows(500, 2), rows(400, 3) + 1
    assert mind(a, b) == pytest.approx(mind(a[torch.randperm(500)], b))
    assert mind(a, b) == pytest.approx(mind(b, a))
    twice = torch.cat([a, a])
    assert mind(twice, a) < 0.01 * mind(a, b)
