r"""Eigenbases of Kronecker factors, and magnitudes along them that need factors only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from laplace_debiased.curvature.factors import (
    BlockBasis,
    BlockFactors,
    KroneckerFactors,
    require_finite,
)
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor, dense
from laplace_debiased.curvature.rows.sides import energies, is_thin, mean_energies
from laplace_debiased.curvature.symmetric import eigenpairs
from laplace_debiased.debiasing.thin import leading, thin_eigenpairs
from laplace_debiased.errors import NumericalError
from laplace_debiased.parallel import Job, Result, Runner, in_turn


def eigenbases(
    parts: Sequence[KroneckerFactors], max_rank: int | None = None, run: Runner = in_turn
) -> list[tuple[BlockBasis, ...]]:
    """Eigendecompose every factor of every part.

    A factor that is kept as k < D rows gives a thin side of its rank.

    Args:
        parts: sets of factors.
        max_rank: at most so many directions per side, the leading ones; None for all.
        run: runs the decompositions.

    Raises:
        NumericalError: naming the parameter, if a factor is not finite or does not converge.
    """
    jobs = [
        Job(block.name, _cost(factor), partial(_side, block.name, factor, what, max_rank))
        for factors in parts
        for block in factors.blocks
        for factor, what in _sides(block)
    ]
    found = iter(run(jobs))
    return [
        tuple(
            _block_basis(block.name, [next(found) for _ in _sides(block)]) for block in part.blocks
        )
        for part in parts
    ]


def eigenbasis(factors: KroneckerFactors, max_rank: int | None = None) -> tuple[BlockBasis, ...]:
    """:func:`eigenbases` of one set of factors."""
    return eigenbases([factors], max_rank)[0]


def _sides(block: BlockFactors) -> list[tuple[Factor, str]]:
    sides: list[tuple[Factor, str]] = [(block.output, "output-gradient covariance")]
    if block.input is not None:
        sides.append((block.input, "input covariance"))
    return sides


def _cost(factor: Factor) -> float:
    """Of its decomposition, in d³; a diagonal needs none."""
    if isinstance(factor, RowsFactor):
        n_rows, side = factor.rows.shape[-2:]
        return float(n_rows**2 * side)
    return 0.0 if factor.ndim == 1 else float(factor.shape[-1] * factor.numel())


def _block_basis(name: str, sides: Sequence[Result]) -> BlockBasis:
    [values, vectors], *inputs = sides
    assert values is not None
    if not inputs:
        return BlockBasis(name, vectors, values)
    return BlockBasis(name, vectors, values, inputs[0][1], inputs[0][0])


def _side(
    name: str, factor: Factor, what: str, max_rank: int | None
) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and basis of a factor, thin where it lacks rank or has more than ``max_rank``."""
    require_finite(name, factor, what)
    if isinstance(factor, RowsFactor):
        return thin_eigenpairs(factor, max_rank, lambda dense: _eigh(name, dense, what))
    values, vectors = _eigh(name, factor, what)
    if vectors is None or max_rank is None or vectors.shape[-1] <= max_rank:
        return values, vectors
    return leading(values, vectors, max_rank)


def _eigh(name: str, factor: Tensor, what: str) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues (clamped at zero) and eigenvectors.

    A diagonal factor [D] is its own eigenvalues, in its own order; its eigenbasis is None.
    """
    if factor.ndim == 1:
        return factor, None
    try:
        values, vectors = eigenpairs(0.5 * (factor + factor.mT))
    except torch.linalg.LinAlgError as error:
        raise NumericalError(
            f"the eigendecomposition of the {what} of parameter {name!r} does not converge. Check "
            "the data for extreme values."
        ) from error
    return values.clamp_min(0.0), vectors


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


def _quadratic_forms(basis: Tensor | None, factor: Factor) -> Tensor:
    """diag(Uᵀ M U), clamped at zero against round-off; a diagonal M [D] comes with U = I.

    Of a thin side last the mean over its complement.
    """
    if basis is None:
        return dense(factor)
    if isinstance(factor, RowsFactor):
        return mean_energies(energies(factor.rows, basis).sum(-2), basis)
    forms = (basis * (factor @ basis)).sum(-2).clamp_min(0.0)
    if not is_thin(basis):
        return forms
    trace = factor.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    outside = (trace - forms.sum(-1, keepdim=True)).clamp_min(0.0)
    return mean_energies(torch.cat([forms, outside], dim=-1), basis)


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
