"""Eigenpairs where LAPACK's fastest algorithm may fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_debiased.curvature.lowrank.span import span_eigenpairs
from laplace_debiased.curvature.rows.gram import RowsFactor
from laplace_debiased.curvature.symmetric import eigenpairs
from laplace_debiased.debiasing.bases import thin_eigenpairs


def gram(n: int, n_zero: int, *lead: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    rows = torch.randn(*lead, n, n, generator=g, dtype=torch.float64)
    rows[..., torch.randperm(n, generator=g)[:n_zero], :] = 0.0
    return rows @ rows.mT


def assert_eigenpairs(matrix: Tensor, values: Tensor, vectors: Tensor) -> None:
    assert torch.allclose(vectors * values.unsqueeze(-2) @ vectors.mT, matrix, atol=1e-10)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    assert torch.allclose(vectors.mT @ vectors, identity.expand_as(matrix), atol=1e-10)
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix), atol=1e-9)


@pytest.mark.parametrize("n_zero", [0, 5, 11, 12])
def test_rows_of_zeros_have_unit_vectors(n_zero: int) -> None:
    assert_eigenpairs(gram(12, n_zero), *eigenpairs(gram(12, n_zero)))


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_converge_is_decomposed_in_another_way(
    lead: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    matrix = gram(9, 2, *lead)
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", failing)
        values, vectors = eigenpairs(matrix.to(dtype))
    assert values.dtype is vectors.dtype is dtype
    if dtype is torch.float64:
        assert_eigenpairs(matrix, values, vectors)


def test_rows_of_which_most_are_zero_have_a_thin_basis() -> None:
    """As those of a deep network with a small layer scale, where float64 failed, too."""
    g = torch.Generator().manual_seed(0)
    rows = torch.zeros(459, 800)
    rows[::17] = 1e-5 * torch.randn(27, 800, generator=g)
    values, basis = thin_eigenpairs("a", RowsFactor(rows), "covariance", None)
    assert basis.shape == (800, 27)
    expected = torch.linalg.svdvals(rows[::17].double()).square().flip(-1)
    assert torch.allclose(values[:-1].double(), expected, rtol=1e-4)


def test_rows_without_curvature_leave_the_span_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Low rank, too, decomposes Gram matrices that may not converge."""
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(8, 20, generator=g, dtype=torch.float64)
    rows[::2] = 0.0
    expected = span_eigenpairs(rows @ rows.mT, torch.ones(8, dtype=rows.dtype))

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", failing)
        found = span_eigenpairs(rows @ rows.mT, torch.ones(8, dtype=rows.dtype))
    assert torch.allclose(found.eigenvalues, expected.eigenvalues, atol=1e-12)
