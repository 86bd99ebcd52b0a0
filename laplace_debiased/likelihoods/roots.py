"""Square roots of covariance matrices that may be singular."""

from __future__ import annotations

import torch
from torch import Tensor

PIVOTED_UP_TO = 64
"""Matrices up to this size are factored by pivoting; its C steps over [C, C] do not pay beyond."""


def centred(covariance: Tensor) -> Tensor:
    """Covariance [..., C, C] of f − mean_c f_c: without the shift that a softmax does not see."""
    rows = covariance.mean(-1)
    return covariance - rows.unsqueeze(-1) - rows.unsqueeze(-2) + rows.mean(-1)[..., None, None]


def pivoted_root(covariance: Tensor) -> Tensor:
    """L [m, C, C] with L Lᵀ = Σ by Cholesky with diagonal pivoting, of any rank.

    Its columns explain the variance greedily, as quasi-random points want it: their first
    dimensions are the most even ones. At equal points the error is a third of a plain Cholesky
    factor's and about that of the eigenvectors. What is left below the dtype's resolution counts
    as zero, so that a singular matrix needs no second attempt. Elementwise operations only: the
    root of a matrix does not depend on its batch.
    """
    rest, columns = covariance, []
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    n = covariance.shape[-1]
    floor = diagonal.amax(-1) * (n * torch.finfo(covariance.dtype).eps)
    tiny = torch.finfo(covariance.dtype).tiny
    # A centred matrix of rank one has its two largest variances equal but for rounding.
    first = torch.linspace(1.0, 0.999, n, dtype=covariance.dtype, device=covariance.device)
    for _ in range(n):
        left = rest.diagonal(dim1=-2, dim2=-1)
        pivot = (left.detach() * first).argmax(-1)
        variance = left.gather(-1, pivot.unsqueeze(-1)).squeeze(-1)
        column = rest.gather(-1, pivot[:, None, None].expand(-1, n, 1)).squeeze(-1)
        counts = (variance > floor).unsqueeze(-1)
        # A clamp inside the root, too: its derivative at zero is infinite.
        scaled = column / variance.clamp_min(tiny).sqrt().unsqueeze(-1)
        column = torch.where(counts, scaled, torch.zeros_like(column))
        columns.append(column)
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
    return torch.stack(columns, dim=-1)


def symmetric_root(covariance: Tensor) -> Tensor:
    """L [..., C, C] with L Lᵀ = Σ: Cholesky factors, eigenvectors where a matrix has none.

    A covariance of low rank (more outputs than weights) has no Cholesky factor in floating point;
    only the matrices that fail take the slower way.
    """
    root, info = torch.linalg.cholesky_ex(covariance)
    failed = info != 0
    if not bool(failed.any()):
        return root
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance[failed])
    eigen_root = eigenvectors * eigenvalues.clamp_min(0.0).sqrt().unsqueeze(-2)
    return root.masked_fill(failed[..., None, None], 0.0).index_put((failed,), eigen_root)
