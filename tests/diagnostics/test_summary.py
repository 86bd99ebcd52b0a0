"""Bias ratios and their errors."""

from __future__ import annotations

import json

import pytest
import torch

from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, MomentSums
from laplace_debiased.diagnostics.summary import summarise


def sampled(means, n, seed, spread=0.1):
    generator = torch.Generator().manual_seed(seed)
    noise = spread * torch.randn(n, len(means), dtype=torch.float64, generator=generator)
    return MomentSums.of(torch.tensor(means, dtype=torch.float64) + noise).estimate()


def quadratic(slopes, curvatures, n=400, seed=0, spread=0.1):
    return DirectionalQuadratic(
        sampled(slopes, n, seed, spread), sampled(curvatures, n, seed + 1, spread)
    )


def test_groups_cover_all_ranks_once_and_ratios_are_ratios_of_means():
    k = 23
    own = quadratic([1.0] * k, [3.0] * k, spread=0.0)
    other = quadratic([0.5] * k, [1.5] * k, spread=0.0)
    summary = summarise(own, other, other, 10)
    assert summary.rows[0].first == 1
    assert all(b.first == a.last + 1 for a, b in zip(summary.rows, summary.rows[1:], strict=False))
    assert (len(summary.rows), summary.rows[-1].last) == (10, k)
    for row in summary.rows:
        assert row.own_to_other.value == pytest.approx(2.0)
        assert row.other_to_reference.value == pytest.approx(1.0)
        assert row.slope_kept_by_reference.value == pytest.approx(0.5)
    assert summary.median_own_to_reference == pytest.approx(2.0)
    assert len(summarise(own, other, None, 100).rows) == k


def test_standard_errors_are_the_spread_over_repetitions():
    # 500 repetitions; the spread of a standard deviation is 3.2 %, so 15 % is 4.7 of its errors.
    own = quadratic([1.0] * 4, [3.0] * 4, spread=0.0)
    rows = [
        summarise(
            own,
            quadratic([1.0] * 4, [1.0] * 4, n=50, seed=4 * i),
            quadratic([1.0] * 4, [1.0] * 4, n=100, seed=4 * i + 2),
            2,
        ).rows[0]
        for i in range(500)
    ]
    for name in ("own_to_reference", "other_to_reference", "own_to_other", "slope_kept_by_other"):
        values = torch.tensor([getattr(row, name).value for row in rows])
        stated = torch.tensor([getattr(row, name).stderr for row in rows]).mean()
        assert float(values.std() / stated) == pytest.approx(1.0, abs=0.15), name


def test_it_prints_a_table_and_exports_plain_numbers():
    own = quadratic([1.0] * 4, [3.0] * 4)
    with_reference, without = summarise(own, own, own, 2), summarise(own, own, None, 2)
    assert "own/ref" in repr(with_reference)
    assert "own/ref" not in repr(without)
    assert "own/other" in repr(without)
    assert json.loads(json.dumps(with_reference.to_dict()))["rows"][0]["first"] == 1
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="n_groups"):
            summarise(own, own, None, bad)
