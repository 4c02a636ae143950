"""The metrics' golden case: every table of numbers in it, at its own tolerance, from the features
it holds.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import Case

from msmdiff.core.metrics.frechet import Gaussian, frechet_distance
from msmdiff.core.metrics.prdc import nearest, prdc
from msmdiff.core.metrics.scores import inception_score, polynomial_mmd


def _close(got: float, expected: float, tolerance: dict[str, float], what: str) -> None:
    limit = tolerance["atol"] + tolerance.get("rtol", 0.0) * abs(expected)
    assert abs(got - expected) <= limit, (
        f"{what}: {got} is not {expected}, off by {abs(got - expected):.3g} > {limit:.3g}"
    )


def frechet(case: Case) -> None:
    for name, expected in case.data["frechet"].items():
        a, b = (Gaussian.fit(case.tensors[f"{name}/{part}"]) for part in ("ref", "gen"))
        for one, two in ((a, b), (b, a)):
            _close(frechet_distance(one, two), expected["exact"], expected["tolerance"], name)
        # From covariances alone, as statistics files hold them.
        thin, full = Gaussian(a.mean, a.cov), Gaussian(b.mean, b.cov)
        _close(
            frechet_distance(thin, full),
            expected["exact"],
            expected["tolerance"],
            f"{name}, covariances",
        )
        _close(
            frechet_distance(a, full),
            expected["exact"],
            expected["tolerance"],
            f"{name}, one factor",
        )


def scores(case: Case) -> None:
    table = dict(case.data["inception_score"])
    tolerance, p = table.pop("tolerance"), case.tensors["is/probabilities"]
    table.pop("std")  # says how, not what
    for name, expected in table.items():
        if name.startswith("adm_split_size_"):
            got = inception_score(p, split_size=int(name.split("_")[3]))
        else:
            kind, _, order = name.removeprefix("splits").partition("_")
            rows = (
                p[case.tensors[f"is/permutation_{order.rpartition('_')[2]}"]]
                if "shuffled" in order
                else p
            )
            got = inception_score(rows, splits=int(kind))
        expected = expected if isinstance(expected, dict) else {"mean": expected}
        for key, value in expected.items():
            _close(got[("mean", "std").index(key)], value, tolerance, f"{name} {key}")


def kid(case: Case) -> None:
    table = case.data["kid"]
    reference, generated = case.tensors["plain/ref"], case.tensors["plain/gen"]
    m = table["full_first_m"]["m"]
    got = polynomial_mmd(reference[:m], generated[:m])
    _close(got, table["full_first_m"]["value"], table["tolerance"], "first m")
    rows = zip(case.tensors["kid/subset_ref_idx"], case.tensors["kid/subset_gen_idx"], strict=True)
    values = torch.tensor(
        [polynomial_mmd(reference[r], generated[g]) for r, g in rows], dtype=torch.float64
    )
    assert len(values) == table["subsets"]["count"]
    _close(float(values.mean()), table["subsets"]["mean"], table["tolerance"], "mean")
    _close(
        float(values.std(correction=0)), table["subsets"]["std"], table["tolerance"], "deviation"
    )


def precision_recall(case: Case) -> None:
    table, k = case.data["precision_recall"], case.data["precision_recall"]["k"]
    reference, generated = case.tensors["pr/ref"], case.tensors["pr/gen"]
    for dtype in (torch.float32, torch.float64):
        got = prdc(generated.to(dtype), reference.to(dtype), k)
        for expected in (table["adm_evaluator"]["float64"], table["torch_fidelity"]):
            for key, value in expected.items():
                _close(got[key], value, table["tolerance"], f"{key} in {dtype}")
        for features, radii in ((reference, "pr/ref_radii2"), (generated, "pr/gen_radii2")):
            nth = nearest(features.to(dtype), None, k)[0][:, -1]
            torch.testing.assert_close(nth.float(), case.tensors[radii], rtol=1e-4, atol=1e-4)


TABLES: dict[str, Callable[[Case], Any]] = {
    "frechet": frechet,
    "inception_score": scores,
    "kid": kid,
    "precision_recall": precision_recall,
}


def run(case: Case, item: str) -> None:
    """One table of the case; fails on a family of features that nothing here reads."""
    known = {f"{name}/" for name in case.data["frechet"]} | {"is/", "kid/", "pr/"}
    if odd := [name for name in case.tensors if not name.startswith(tuple(known))]:
        pytest.fail(f"unread tensors: {odd}")
    TABLES[item](case)
