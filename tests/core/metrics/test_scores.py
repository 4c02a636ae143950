"""The numbers: closed forms, invariants, and independent computations."""

import numpy as np
import pytest
import scipy.linalg
import torch

from msmdiff.core import registry
from msmdiff.core.errors import UsageError
from msmdiff.core.metrics import prdc as module
from msmdiff.core.metrics.features import Features
from msmdiff.core.metrics.frechet import Gaussian, frechet_distance
from msmdiff.core.metrics.prdc import nearest, prdc
from msmdiff.core.metrics.scores import inception_score, kid, polynomial_mmd
from msmdiff.core.metrics.statistics import Statistics


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def gaussian(d, rank=None, seed=0):
    a = normal(d, rank or 2 * d, seed=seed)
    return Gaussian(normal(d, seed=seed + 1), a @ a.T / a.shape[1])


def test_diagonal_covariances_have_a_closed_form():
    m1, m2 = normal(2, 6)
    s1, s2 = normal(2, 6, seed=1).abs() + 0.1
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    got = frechet_distance(Gaussian(m1, torch.diag(s1**2)), Gaussian(m2, torch.diag(s2**2)))
    assert got == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("rank", [None, 3])
def test_distance_to_itself_symmetry_and_rotation(rank):
    a, b = gaussian(20, rank), gaussian(20, seed=5)
    assert frechet_distance(a, a) < 1e-3
    there = frechet_distance(a, b)
    assert there == pytest.approx(frechet_distance(b, a), rel=1e-6)
    q, _ = torch.linalg.qr(normal(20, 20, seed=9))
    turned = [Gaussian(q @ g.mean, q @ g.cov @ q.T) for g in (a, b)]
    assert there == pytest.approx(frechet_distance(*turned), rel=1e-6)


def test_it_equals_the_matrix_root_where_that_is_well_conditioned():
    a, b = gaussian(64), gaussian(64, seed=3)
    root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_fewer_samples_than_dimensions_are_exact():
    """Of n samples the distance is that of the same numbers in n - 1 dimensions."""
    x, y = normal(10, 3), normal(12, 3, seed=1) * 2 + 1
    q, _ = torch.linalg.qr(normal(50, 3, seed=2))
    there = frechet_distance(Gaussian.fit(x), Gaussian.fit(y))
    wide = Gaussian.fit(x @ q.T), Gaussian.fit(y @ q.T)
    assert wide[0].root is not None
    assert frechet_distance(*wide) == pytest.approx(there, rel=1e-10)
    assert frechet_distance(wide[0], Gaussian(wide[1].mean, wide[1].cov)) == pytest.approx(
        there, rel=1e-6
    )
    assert frechet_distance(wide[0], wide[0]) < 1e-12


def test_inception_score_of_certain_and_of_uniform_classes():
    assert inception_score(torch.eye(4).repeat(5, 1), splits=1)[0] == pytest.approx(4)
    assert inception_score(torch.full((20, 4), 0.25), splits=10) == (
        pytest.approx(1),
        pytest.approx(0),
    )
    p = torch.cat([torch.eye(2).repeat(3, 1), torch.full((6, 2), 0.5)])
    assert inception_score(p, splits=2) == (pytest.approx(1.5), pytest.approx(0.5))
    assert inception_score(p, split_size=6) == inception_score(p, splits=2)
    with pytest.raises(UsageError, match=r"always 1: 3 images .* metric.is_splits 10 .* at most 1"):
        inception_score(p[:3], splits=10)


class Certain(Features):
    """Features that are the probabilities of classes."""

    def probabilities(self, features):
        return features.double()


def scored(name, rows, **options):
    entry = registry.find("metric", name, "metrics")
    made = entry.make(**entry.options(**options).model_dump())
    statistics = Statistics(Gaussian.fit(rows), len(rows), rows=rows)
    return made.scores(statistics, statistics, Certain())[0]


def test_the_order_of_class_folders_does_not_make_the_inception_score():
    rows = torch.eye(10).repeat_interleave(100, 0) * 0.99 + 0.001
    shuffled, files = scored("is", rows), scored("is", rows, is_order="files")
    assert shuffled.title == "Inception Score"
    assert shuffled.value == pytest.approx(8.9, abs=0.2)
    assert files.title == "Inception Score, in file order"
    assert files.value == pytest.approx(1)
    order = np.random.RandomState(2020).permutation(1000)  # torch-fidelity's
    assert shuffled.value == inception_score(rows[torch.from_numpy(order)], 10)[0]


def test_an_inception_score_of_too_few_images_is_refused_before_they_are_measured():
    made = registry.find("metric", "is", "metrics").make(is_splits=10)
    with pytest.raises(UsageError, match=r"12 images .* metric.is_splits 10 parts .* at most 6"):
        made.check(12, 12)
    made.check(0, 12)  # not known yet


def test_kid_says_where_its_subsets_are_smaller_or_all_the_same():
    few = scored("kid", normal(20, 4), kid_size=1000, kid_subsets=3)
    assert few.title == "KID of subsets of 20, for want of 1,000"
    assert few.deviation is None
    many = scored("kid", normal(20, 4), kid_size=10, kid_subsets=3)
    assert many.title == "KID"
    assert many.deviation > 0


def test_kid_is_unbiased_and_finds_a_shift():
    x, y = normal(60, 4), normal(50, 4, seed=1)

    def kernel(a, b):
        return float((a @ b / 4 + 1) ** 3)

    pairs = [
        np.mean([kernel(v[i], v[j]) for i in range(len(v)) for j in range(len(v)) if i != j])
        for v in (x, y)
    ]
    cross = np.mean([kernel(a, b) for a in x for b in y])
    assert polynomial_mmd(x, y) == pytest.approx(sum(pairs) - 2 * cross, rel=1e-9)
    assert abs(kid(x, y, 20, 40)[0]) < 0.5 < kid(x, y + 2, 20, 40)[0]
    assert kid(x, y, 20, 40) == kid(x, y, 20, 40)
    whole = kid(x[:50], y, 3, 1000)  # not so many: every subset is all of both
    assert whole == (pytest.approx(polynomial_mmd(x[:50], y)), pytest.approx(0, abs=1e-9))


def brute(samples, reference, k, k_density):
    """By whole distance matrices and sorting."""
    d = torch.cdist(samples, reference)
    across = d.T
    own = torch.cdist(reference, reference).sort(1).values
    others = torch.cdist(samples, samples).sort(1).values
    return {
        "precision": float((d <= own[:, k]).any(1).double().mean()),
        "recall": float((across <= others[:, k]).any(1).double().mean()),
        "density": float((d <= own[:, k_density]).sum()) / (k_density * len(samples)),
        "coverage": float((d <= own[:, k_density]).any(0).double().mean()),
    }


def test_prdc_and_neighbours_are_those_of_whole_matrices_whatever_the_tile(monkeypatch):
    samples, reference = normal(70, 6), normal(90, 6, seed=1) * 1.3 + 0.3
    expected = brute(samples, reference, 3, 5)
    assert len(set(expected.values())) == 4
    whole = nearest(samples, reference, 4)
    monkeypatch.setattr(module, "TILE", 17)
    assert prdc(samples, reference, 3, 5) == pytest.approx(expected)
    for got, there in zip(nearest(samples, reference, 4), whole, strict=True):
        torch.testing.assert_close(got, there)
    torch.testing.assert_close(
        whole[1], torch.cdist(samples, reference).topk(4, largest=False).indices
    )
    own = torch.cdist(samples, samples).sort(1)
    torch.testing.assert_close(nearest(samples, None, 3)[0].sqrt(), own.values[:, 1:4])
    torch.testing.assert_close(nearest(samples, None, 3)[1], own.indices[:, 1:4])
    same = prdc(samples, samples, 3, 5)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    far = prdc(samples + 1000, reference, 3, 5)
    assert set(far.values()) == {0}
    few = samples[:2], reference[:3]  # fewer images than neighbours: the farthest counts
    assert prdc(*few, 3, 5) == prdc(*few, 2, 2)


@pytest.mark.gpu
def test_a_gpu_gives_the_scores_of_the_cpu():
    x, y = normal(300, 20).float(), normal(310, 20, seed=1).float() * 1.2
    a, b = (Gaussian.fit(v) for v in (x, y))
    on_gpu = [Gaussian.fit(v.cuda()) for v in (x, y)]
    assert frechet_distance(*on_gpu, "cuda") == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert kid(x, y, 5, 100, "cuda") == pytest.approx(kid(x, y, 5, 100), rel=1e-9)
    assert prdc(x, y, device="cuda") == pytest.approx(prdc(x, y), abs=0.01)
