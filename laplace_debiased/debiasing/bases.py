r"""Eigenbases of Kronecker factors, and magnitudes along them that need factors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_debiased.curvature.factors import (
    BlockBasis,
    BlockFactors,
    KroneckerFactors,
    require_finite,
    sum_weighted,
)
from laplace_debiased.errors import NumericalError


def eigenbasis(factors: KroneckerFactors) -> tuple[BlockBasis, ...]:
    """Eigendecompose every factor.

    Raises:
        NumericalError: naming the parameter, if a factor is not finite or does not converge.
    """
    return tuple(_block_basis(block) for block in factors.blocks)


def _block_basis(block: BlockFactors) -> BlockBasis:
    output_values, output_vectors = _eigh(block.name, block.output, "output-gradient covariance")
    if block.input is None:
        return BlockBasis(block.name, output_vectors, output_values)
    input_values, input_vectors = _eigh(block.name, block.input, "input covariance")
    return BlockBasis(block.name, output_vectors, output_values, input_vectors, input_values)


def _eigh(name: str, factor: Tensor, what: str) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (clamped at zero) and eigenvectors; once more in float64 if that fails.

    A diagonal factor [D] is its own eigenvalues, in its own order; its eigenbasis is None.
    """
    require_finite(name, factor, what)
    if factor.ndim == 1:
        return factor, None
    symmetric = 0.5 * (factor + factor.mT)
    for dtype in (factor.dtype, torch.float64):
        try:
            values, vectors = _eigh_of_support(symmetric.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        return values.clamp_min(0.0).to(factor.dtype), vectors.to(factor.dtype)
    raise NumericalError(
        f"the eigendecomposition of the {what} of parameter {name!r} does not converge. Check the "
        "data for extreme values."
    )


def _eigh_of_support(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` of a positive semi-definite matrix, zero rows and columns set apart.

    Dead units, and kernel positions that only ever read padding, give rows of exact zeros. LAPACK's
    divide-and-conquer can fail to converge on many of them; their eigenvectors are unit vectors.
    """
    support = (matrix != 0).any(-1)
    if matrix.ndim > 2 or bool(support.all()) or not bool(support.any()):
        return torch.linalg.eigh(matrix)
    inside, outside = support.nonzero().squeeze(-1), (~support).nonzero().squeeze(-1)
    found, vectors = torch.linalg.eigh(matrix[inside[:, None], inside])
    n_zero = len(outside)
    values = torch.cat([found.new_zeros(n_zero), found])
    basis = torch.zeros_like(matrix)
    basis[outside, torch.arange(n_zero, device=matrix.device)] = 1.0
    basis[inside[:, None], torch.arange(n_zero, len(matrix), device=matrix.device)] = vectors
    return values, basis


def kfac_magnitudes(basis: Sequence[BlockBasis], factors: KroneckerFactors) -> tuple[Tensor, ...]:
    r"""λ_ij = (u_B,iᵀ B̃ u_B,i)(u_A,jᵀ Ã u_A,j) per block: the paper's magnitudes.

    Tatzel et al. 2025, section 6. Per-sample means, like ``factors``. With the basis of the same
    factors this is the K-FAC eigenvalue table itself.
    """
    return tuple(
        _kfac_table(block, measured) for block, measured in zip(basis, factors.blocks, strict=True)
    )


def _kfac_table(basis: BlockBasis, factors: BlockFactors) -> Tensor:
    outputs = _quadratic_forms(basis.output_basis, factors.output)
    if factors.input is None:
        return outputs
    return _outer(outputs, _quadratic_forms(basis.input_basis, factors.input))


def _quadratic_forms(basis: Tensor | None, factor: Tensor) -> Tensor:
    """diag(Uᵀ M U), clamped at zero against round-off; a diagonal M [D] comes with U = I."""
    if basis is None:
        return factor
    return (basis * (factor @ basis)).sum(-2).clamp_min(0.0)


def _outer(outputs: Tensor, inputs: Tensor) -> Tensor:
    """[..., D_out] and [..., D_in] to [..., D_out, D_in]."""
    return outputs.unsqueeze(-1) * inputs.unsqueeze(-2)


def own_magnitudes(basis: Sequence[BlockBasis]) -> tuple[Tensor, ...]:
    """Outer products of the factors' own eigenvalues: what a single batch reports of itself."""
    return tuple(
        block.output_eigenvalues
        if block.input_eigenvalues is None
        else _outer(block.output_eigenvalues, block.input_eigenvalues)
        for block in basis
    )


def join_by_rank(tables: Sequence[Sequence[Tensor]], shares: Sequence[float]) -> tuple[Tensor, ...]:
    """Average eigenvalue tables of several eigenbases entry by entry.

    Bases list their factor eigenvectors by ascending eigenvalue, so that equal indices are equal
    ranks: the average is taken over ranks, not over directions (Lam 2016; Bartz 2016). Where a
    factor is a diagonal all bases are the identity, and equal indices are equal directions.

    Args:
        tables: per fold, one table per block.
        shares: weight of every fold; they sum to 1.
    """
    return tuple(sum_weighted(list(group), shares) for group in zip(*tables, strict=True))
