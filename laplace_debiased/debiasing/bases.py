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
from laplace_debiased.curvature.lowrank.span import relative_cutoff
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor, dense
from laplace_debiased.curvature.rows.sides import energies, is_thin, mean_energies
from laplace_debiased.curvature.symmetric import eigenpairs
from laplace_debiased.errors import NumericalError
from laplace_debiased.parallel.jobs import Job, Runner, in_turn

_FEW_ROWS = 0.6
"""Rows up to this share of the side go through their Gram matrix, in float64; beyond, a
decomposition of the whole factor in its own dtype is faster."""

_ORTHONORMAL = 1e-12


def eigenbases(
    parts: Sequence[KroneckerFactors], max_rank: int | None = None, run: Runner = in_turn
) -> list[tuple[BlockBasis, ...]]:
    """Eigendecompose every factor of every part; ``run`` runs the decompositions.

    A factor that is kept as k < D rows gives a thin side of its rank. At most ``max_rank``
    directions per side are kept, the leading ones; None for all.

    Raises:
        NumericalError: naming the parameter, if a factor is not finite or does not converge.
    """
    jobs = []
    for block in (block for part in parts for block in part.blocks):
        for factor, what in (
            (block.output, "output-gradient covariance"),
            (block.input, "input covariance"),
        ):
            if factor is not None:
                side = partial(_side, block.name, factor, what, max_rank)
                jobs.append(Job(block.name, _cost(factor), side))
    found = iter(run(jobs))

    def basis_of(block: BlockFactors) -> BlockBasis:
        values, vectors = next(found)
        if block.input is None:
            return BlockBasis(block.name, vectors, values)
        input_values, input_vectors = next(found)
        return BlockBasis(block.name, vectors, values, input_vectors, input_values)

    return [tuple(map(basis_of, part.blocks)) for part in parts]


def eigenbasis(factors: KroneckerFactors, max_rank: int | None = None) -> tuple[BlockBasis, ...]:
    """:func:`eigenbases` of one set of factors."""
    return eigenbases([factors], max_rank)[0]


def _cost(factor: Factor) -> float:
    """Of its decomposition, in d³; a diagonal needs none."""
    if isinstance(factor, RowsFactor):
        n_rows, side = factor.rows.shape[-2:]
        return float(n_rows**2 * side)
    return 0.0 if factor.ndim == 1 else float(factor.shape[-1] * factor.numel())


def _side(
    name: str, factor: Factor, what: str, max_rank: int | None
) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues and basis of a factor, thin where it lacks rank or has more than ``max_rank``."""
    require_finite(name, factor, what)
    if isinstance(factor, RowsFactor):
        return thin_eigenpairs(name, factor, what, max_rank)
    values, vectors = _eigh(name, factor, what)
    if vectors is None or max_rank is None or vectors.shape[-1] <= max_rank:
        return values, vectors
    others = values[..., :-max_rank].mean(-1, keepdim=True)
    values = torch.cat([values[..., -max_rank:], others], dim=-1)
    return values, vectors[..., -max_rank:].contiguous()


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


def thin_eigenpairs(
    name: str, factor: RowsFactor, what: str, max_rank: int | None
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of Rᵀ R above rounding, ascending, through the smaller of R Rᵀ and Rᵀ R.

    R is [k, D] or [G, k, D], k < D; at most ``max_rank`` leading pairs, None for all. Returns
    eigenvalues [..., r + 1], last the mean of all that is left out, and the basis [..., D, r]. In
    a group of lower rank than the others the first columns are zeros, with that mean.
    """
    rows = factor.rows
    n_rows, side = rows.shape[-2:]
    if n_rows <= _FEW_ROWS * side or rows.dtype is torch.float64:
        values, vectors = _through_gram(rows.double(), relative_cutoff(rows.dtype))
    else:
        found, whole = _eigh(name, factor.dense(), what)
        assert whole is not None
        values, vectors = found.flip(-1)[..., :n_rows], whole.flip(-1)[..., :n_rows]
        kept = values > relative_cutoff(rows.dtype) * values[..., :1]
        values, vectors = values * kept, vectors * kept.unsqueeze(-2)
    return _kept(values.to(rows), vectors.to(rows), max_rank)


def _through_gram(rows: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., k] and vectors [..., D, k] of Rᵀ R, descending, zero below the cutoff."""
    gram = rows @ rows.mT
    values, small = eigenpairs((gram + gram.mT) / 2)
    values, small = values.flip(-1).clamp_min(0.0), small.flip(-1)
    kept = values > cutoff * values[..., :1]
    rank = int(kept.sum(-1).max())
    kept, values, small = kept[..., :rank], values[..., :rank], small[..., :rank]
    scales = torch.where(kept, values, 1.0).rsqrt() * kept
    vectors = rows.mT @ (small * scales.unsqueeze(-2))
    overlap = vectors.mT @ vectors - torch.diag_embed(kept.to(values))
    if rank and float(overlap.abs().max()) > _ORTHONORMAL:
        # Of small eigenvalues: the leading ones come first and stay as they are.
        q, r = torch.linalg.qr(vectors)
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        vectors = q * (signs * kept).unsqueeze(-2)
    return values * kept, vectors


def _kept(values: Tensor, vectors: Tensor, max_rank: int | None) -> tuple[Tensor, Tensor]:
    """The leading pairs of descending ones that may be zeros, ascending, with the rest's mean."""
    rank = int((values > 0).sum(-1).max()) if values.shape[-1] else 0
    rank = rank if max_rank is None else min(rank, max_rank)
    kept = values[..., :rank]
    n_rest = vectors.shape[-2] - (kept > 0).sum(-1, keepdim=True)
    rest = values[..., rank:].sum(-1, keepdim=True) / n_rest
    kept = torch.where(kept > 0, kept, rest)
    # A basis of no direction has its shape still.
    return torch.cat([kept.flip(-1), rest], dim=-1), vectors[..., :rank].flip(-1).contiguous()


def kfac_magnitudes(basis: Sequence[BlockBasis], factors: KroneckerFactors) -> tuple[Tensor, ...]:
    r"""λ_ij = (u_B,iᵀ B̃ u_B,i)(u_A,jᵀ Ã u_A,j) per block: the paper's magnitudes.

    Tatzel et al. 2025, section 6. Per-sample means, like ``factors``. With the basis of the same
    factors this is the K-FAC eigenvalue table itself.
    """
    tables = []
    for block, measured in zip(basis, factors.blocks, strict=True):
        table = _quadratic_forms(block.output_basis, measured.output)
        if measured.input is not None:
            table = _outer(table, _quadratic_forms(block.input_basis, measured.input))
        tables.append(table)
    return tuple(tables)


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
