r"""Eigenpairs of matrices G = Zᵀ F Fᵀ Z [P, P] that live in the span of q rows Z [q, P].

All of the algebra is done with the Gram matrix K = Z Zᵀ [q, q] in float64: an eigenvector is Zᵀ a
with coefficients a [q], and products of eigenvectors with rows are entries of K a. Squaring the
condition number then costs no digit that float32 rows ever had. Only the final basis is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.curvature.symmetric import eigenpairs
from laplace_debiased.errors import NumericalError

_BLOCK_ENTRIES = 2**22
"""Entries of a float64 copy of some columns of the rows (32 MiB)."""

_DEPENDENT = 1e-6
"""Overlap eigenvalues below this share of the largest are of directions that depend on others."""

_ORTHONORMAL = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Leading eigenpairs of a positive semi-definite matrix, largest first.

    Attributes:
        basis: orthonormal U [P, k].
        eigenvalues: λ [k], none negative, float64.
    """

    basis: Tensor
    eigenvalues: Tensor

    @property
    def rank(self) -> int:
        """Number of eigenpairs."""
        return len(self.eigenvalues)


@dataclass(frozen=True, eq=False)
class SpanDirections:
    """Orthonormal directions u_k = Zᵀ a_k by their coefficients.

    Attributes:
        coefficients: a_k as columns [q, k], float64.
        eigenvalues: eigenvalue along each on the data that gave them [k], float64, descending.
    """

    coefficients: Tensor
    eigenvalues: Tensor


def relative_cutoff(dtype: torch.dtype) -> float:
    """Eigenvalues of a Gram matrix below this share of the largest are rounding noise.

    A row in floating point is off by about eps of its norm (100 eps after a backward pass through
    many layers, to be safe), so singular values of the rows are known to 100 eps of the largest,
    and eigenvalues, their squares, to the square of that: 1.4e-10 in float32. Float64 rows are
    better than the float64 Gram matrix, whose own rounding (a few hundred eps) gives 1e-13.
    """
    return max((100 * torch.finfo(dtype).eps) ** 2, 1e-13)


def gram_matrix(rows: Tensor) -> Tensor:
    """K = Z Zᵀ [q, q] in float64, of rows Z [q, P]."""
    return products_of_rows(rows, rows)


def products_of_rows(rows: Tensor, others: Tensor) -> Tensor:
    """Z Yᵀ [q, p] in float64, from rows Z [q, P] and Y [p, P] in blocks of columns."""
    products = rows.new_zeros((len(rows), len(others)), dtype=torch.float64)
    width = _block_width(max(len(rows), len(others)))
    for one, two in zip(rows.split(width, dim=1), others.split(width, dim=1), strict=True):
        products.addmm_(one.double(), two.double().T)
    return products


def span_eigenpairs(
    gram: Tensor, factor: Tensor, *, rank: int | None = None, cutoff: float = 1e-13
) -> SpanDirections:
    """Eigenpairs of Zᵀ F Fᵀ Z, largest first.

    The non-zero ones are those of Fᵀ K F = V Σ Vᵀ, with eigenvectors Zᵀ F V Σ^-½.

    Args:
        gram: K [q, q], float64.
        factor: F, its diagonal [q] or the whole matrix [q, r].
        rank: at most so many; None for all above the cutoff.
        cutoff: share of the largest eigenvalue below which one counts as zero.

    Raises:
        NumericalError: if the matrix is not finite, or vanishes.
    """
    if factor.ndim == 1:
        used = factor.nonzero().squeeze(-1)
        small = factor[used, None] * gram[used][:, used] * factor[used]
    else:
        small = factor.T @ gram @ factor
    if not bool(torch.isfinite(small).all()):
        raise NumericalError(
            "the curvature is NaN or infinite. Check the data and the weights for extreme values."
        )
    values, vectors = eigenpairs((small + small.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    if not len(values) or not bool(values[0] > 0):
        raise NumericalError(
            "the curvature of the drawn samples vanishes: no eigenvalue is positive. The outputs "
            "may not depend on the covered parameters, or the predictions are saturated."
        )
    kept = int((values > cutoff * values[0]).sum())
    kept = kept if rank is None else min(kept, rank)
    scaled = vectors[:, :kept] * values[:kept].rsqrt()
    if factor.ndim == 2:
        return SpanDirections(factor @ scaled, values[:kept])
    coefficients = scaled.new_zeros((len(gram), kept))
    coefficients[used] = factor[used, None] * scaled
    return SpanDirections(coefficients, values[:kept])


def orthonormal_pairs(rows: Tensor, directions: SpanDirections) -> Eigenpairs:
    """Form the basis Zᵀ A of rows Z [q, P], orthonormal to the precision of its dtype."""
    return orthonormalised(combined_rows(rows, directions.coefficients), directions.eigenvalues)


def orthonormalised(basis: Tensor, eigenvalues: Tensor) -> Eigenpairs:
    """Eigenpairs of U diag(λ) Uᵀ for a basis U [P, k] that is orthonormal but for rounding.

    Directions of small eigenvalue come out of cancelling rows, so that the Gram matrix L Lᵀ of what
    was formed may be off the identity. Then U L^-ᵀ is orthonormal, and Lᵀ diag(λ) L is what the
    matrix U diag(λ) Uᵀ is in that basis; its eigenvectors are orthonormal however small the λ.
    Where directions depend on one another (more of them than parameters, which rounding noise
    above the cutoff can give) an eigenvalue root takes the place of L and leaves out what is not
    there.
    """
    overlap = gram_matrix(basis.T)
    identity = torch.eye(len(overlap), dtype=overlap.dtype, device=overlap.device)
    if float((overlap - identity).abs().max()) <= _ORTHONORMAL[basis.dtype]:
        return Eigenpairs(basis, eigenvalues)
    root, inverse = _root_and_inverse(overlap)
    core = root.T @ (eigenvalues[:, None] * root)
    values, rotation = eigenpairs((core + core.T) / 2)
    rotation = inverse.T @ rotation.flip(1)
    return Eigenpairs(combined_rows(basis.T, rotation), values.flip(0).clamp_min(0.0))


def _root_and_inverse(overlap: Tensor) -> tuple[Tensor, Tensor]:
    """R [k, r] with R Rᵀ the overlap, and its left inverse [r, k]; r = k unless it is singular."""
    lower, failed = torch.linalg.cholesky_ex(overlap)
    if not int(failed):
        identity = torch.eye(len(overlap), dtype=overlap.dtype, device=overlap.device)
        return lower, torch.linalg.solve_triangular(lower, identity, upper=False)
    values, vectors = eigenpairs(overlap)
    kept = values > _DEPENDENT * values[-1]
    scale = values[kept].sqrt()
    return vectors[:, kept] * scale, (vectors[:, kept] / scale).T


def matrix_average(
    parts: Sequence[Eigenpairs], shares: Sequence[float], rank: int | None = None
) -> Eigenpairs:
    """Eigenpairs of Σ_k share_k U_k diag(λ_k) U_kᵀ, from the Gram matrix of all bases.

    No direction is matched with another: a basis that has no direction where another has one counts
    as zero there only in its own share.

    Raises:
        NumericalError: if the sum is not finite, or vanishes.
    """
    bases = torch.cat([part.basis for part in parts], dim=1)
    magnitudes = zip(parts, shares, strict=True)
    scaled = torch.cat([part.eigenvalues.double() * share for part, share in magnitudes])
    found = span_eigenpairs(
        gram_matrix(bases.T),
        scaled.clamp_min(0.0).sqrt(),
        rank=rank,
        cutoff=relative_cutoff(bases.dtype),
    )
    return orthonormal_pairs(bases.T, found)


def combined_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Zᵀ A [P, k] in the dtype of the rows, accumulated in float64."""
    result = rows.new_empty((rows.shape[1], coefficients.shape[1]))
    width = _block_width(len(rows))
    for start in range(0, rows.shape[1], width):
        block = rows[:, start : start + width].double()
        result[start : start + width] = block.T @ coefficients
    return result


def _block_width(n_rows: int) -> int:
    return max(1, _BLOCK_ENTRIES // max(1, n_rows))
