"""Sizes and assignments of folds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_debiased.data.build import fold_sizes, interleaved_folds


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 500), parts=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_sizes_sum_to_n_and_are_shares_rounded(n, parts):
    if n < len(parts):
        return
    shares = [part / sum(parts) for part in parts]
    sizes = fold_sizes(n, shares)
    assert sum(sizes) == n
    assert min(sizes) >= 1
    if all(n * share >= 1 for share in shares):
        assert max(abs(size - n * s) for size, s in zip(sizes, shares, strict=True)) < 1 + 1e-9


def test_the_largest_remainder_is_rounded_up():
    assert fold_sizes(100, (0.43, 0.57)) == (43, 57)
    assert fold_sizes(10, (0.11, 0.44, 0.45)) == (1, 4, 5)
    assert fold_sizes(7, (0.1, 0.1, 0.8)) == (1, 1, 5)


def test_no_fold_is_empty_however_small_its_share():
    assert fold_sizes(3, (0.98, 0.01, 0.01)) == (1, 1, 1)
    with pytest.raises(ValueError, match="cannot be split into 3 folds"):
        fold_sizes(2, (1 / 3,) * 3)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_a_streams_folds_are_spread_evenly(sizes):
    folds = interleaved_folds(sizes)
    n = len(folds)
    assert torch.bincount(folds, minlength=len(sizes)).tolist() == sizes
    for k, size in enumerate(sizes):
        seen = (folds == k).cumsum(0).double()
        assert float((seen - torch.arange(1, n + 1) * size / n).abs().max()) <= len(sizes)


@pytest.mark.parametrize("folds", [1, 2, 3, 7, 49])
def test_equal_shares_differ_by_at_most_one_and_are_dealt_in_turn(folds):
    for n in range(folds, 150):
        sizes = fold_sizes(n, (1 / folds,) * folds)
        assert sizes == tuple(n // folds + (k < n % folds) for k in range(folds))
        assert interleaved_folds(sizes).tolist() == [i % folds for i in range(n)]
