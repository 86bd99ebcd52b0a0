"""Eigenpairs from Gram matrices against dense eigendecompositions; pure tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_debiased.curvature.lowrank.span import (
    Eigenpairs,
    gram_matrix,
    matrix_average,
    orthonormal_pairs,
    relative_cutoff,
    span_eigenpairs,
)
from laplace_debiased.errors import NumericalError
from tests.lowrank.problems import along, eigenvectors
from tests.tolerances import relative_error


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=20, deadline=None)
@given(q=st.integers(1, 6), p=st.integers(6, 9), seed=st.integers(0, 10**6))
def test_eigenpairs_of_weighted_rows_equal_the_dense_ones(q, p, seed):
    g = generator(seed)
    rows = torch.randn(q, p, dtype=torch.float64, generator=g)
    root = torch.rand(q, dtype=torch.float64, generator=g) + 0.1
    root[seed % q] = 0.0 if q > 1 else 1.0
    dense = rows.T @ (root.square()[:, None] * rows)
    pairs = orthonormal_pairs(rows, span_eigenpairs(gram_matrix(rows), root))
    values, _ = eigenvectors(dense)
    assert relative_error(pairs.eigenvalues, values) < 1e-9
    assert relative_error(along(pairs.basis, pairs.eigenvalues), dense) < 1e-9
    identity = torch.eye(pairs.rank, dtype=torch.float64)
    assert float((pairs.basis.T @ pairs.basis - identity).abs().max()) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bases_are_orthonormal_down_to_the_cutoff(dtype):
    # Rows over six decades: the last directions come out of cancelling rows.
    g = generator(0)
    scales = torch.logspace(0, -6, 40, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=g)).Q
    right = torch.linalg.qr(torch.randn(90, 40, dtype=torch.float64, generator=g)).Q
    rows = ((left * scales) @ right.T).to(dtype)
    directions = span_eigenpairs(
        gram_matrix(rows), torch.ones(40, dtype=torch.float64), cutoff=relative_cutoff(dtype)
    )
    basis = orthonormal_pairs(rows, directions).basis.double()
    defect = (basis.T @ basis - torch.eye(basis.shape[1])).abs().max()
    assert float(defect) < {torch.float32: 2e-6, torch.float64: 1e-11}[dtype]


def test_dependent_rows_give_no_directions_of_rounding_noise():
    rows = torch.randn(3, 50, generator=generator(1))
    doubled = torch.cat([rows, rows @ torch.eye(50), rows[:1] + rows[1:2]])
    found = span_eigenpairs(
        gram_matrix(doubled),
        torch.ones(len(doubled), dtype=torch.float64),
        cutoff=relative_cutoff(torch.float32),
    )
    assert len(found.eigenvalues) == 3


@pytest.mark.parametrize("seed", range(5))
def test_more_directions_than_parameters_are_joined_into_what_they_span(seed):
    """Rounding noise of a Gram matrix beside which the last parameter's curvature is small."""
    g = generator(seed)
    rows = torch.randn(12, 4, dtype=torch.float64, generator=g) * torch.logspace(0, -5, 4)
    found = span_eigenpairs(gram_matrix(rows), torch.ones(12, dtype=torch.float64), cutoff=1e-18)
    assert len(found.eigenvalues) > 4
    pairs = orthonormal_pairs(rows, found)
    assert relative_error(along(pairs.basis, pairs.eigenvalues), rows.T @ rows) < 1e-9
    identity = torch.eye(pairs.rank, dtype=torch.float64)
    assert float((pairs.basis.T @ pairs.basis - identity).abs().max()) < 1e-9


def test_rank_keeps_the_largest():
    rows = torch.randn(6, 9, dtype=torch.float64, generator=generator(2))
    gram, ones = gram_matrix(rows), torch.ones(6, dtype=torch.float64)
    whole, part = span_eigenpairs(gram, ones), span_eigenpairs(gram, ones, rank=2)
    assert torch.equal(part.eigenvalues, whole.eigenvalues[:2])


def test_matrix_average_is_the_weighted_sum():
    g, shares = generator(3), (0.3, 0.7)
    parts, dense = [], torch.zeros(9, 9, dtype=torch.float64)
    for share, rank in zip(shares, (4, 6), strict=True):
        basis = torch.linalg.qr(torch.randn(9, rank, dtype=torch.float64, generator=g)).Q
        magnitudes = torch.rand(rank, dtype=torch.float64, generator=g)
        parts.append(Eigenpairs(basis, magnitudes))
        dense += share * basis @ magnitudes.diag() @ basis.T
    pairs = matrix_average(parts, shares)
    assert relative_error(along(pairs.basis, pairs.eigenvalues), dense) < 1e-10
    swapped = matrix_average(parts[::-1], shares[::-1])
    assert relative_error(along(swapped.basis, swapped.eigenvalues), dense) < 1e-10
    values, vectors = eigenvectors(dense, 3)
    leading = matrix_average(parts, shares, 3)
    assert relative_error(along(leading.basis, leading.eigenvalues), along(vectors, values)) < 1e-9


def test_vanishing_and_infinite_curvature_are_errors():
    with pytest.raises(NumericalError, match="vanishes"):
        span_eigenpairs(torch.zeros(2, 2).double(), torch.ones(2).double())
    with pytest.raises(NumericalError, match="NaN or infinite"):
        span_eigenpairs(torch.full((2, 2), torch.nan).double(), torch.ones(2).double())
