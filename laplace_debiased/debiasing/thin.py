"""Eigenpairs of factors that lack rank, or that have more of it than is kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from laplace_debiased.curvature.lowrank.span import relative_cutoff
from laplace_debiased.curvature.rows.gram import RowsFactor
from laplace_debiased.curvature.symmetric import eigenpairs

_FEW_ROWS = 0.6
"""Rows up to this share of the side go through their Gram matrix, in float64; beyond, a
decomposition of the whole factor in its own dtype is faster."""

_ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-12}


def thin_eigenpairs(
    factor: RowsFactor,
    max_rank: int | None,
    eigh: Callable[[Tensor], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of Rᵀ R above rounding, ascending, through the smaller of R Rᵀ and Rᵀ R.

    Args:
        factor: R [k, D] or [G, k, D], k < D.
        max_rank: at most so many, the leading ones; None for all.
        eigh: eigenpairs of a whole matrix, ascending.

    Returns:
        Eigenvalues [..., r + 1], last the mean of all that is left out, and basis [..., D, r]. In a
        group of lower rank than the others the first columns are zeros, with that mean.
    """
    rows = factor.rows
    n_rows, side = rows.shape[-2:]
    if n_rows <= _FEW_ROWS * side or rows.dtype is torch.float64:
        values, vectors = _through_gram(rows.double(), relative_cutoff(rows.dtype))
    else:
        found, whole = eigh(factor.dense())
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
    if rank and float(overlap.abs().max()) > _ORTHONORMAL[torch.float64]:
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


def leading(values: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading of all D ascending eigenpairs, with the mean of the others."""
    others = values[..., :-rank].mean(-1, keepdim=True)
    return torch.cat([values[..., -rank:], others], dim=-1), vectors[..., -rank:].contiguous()
