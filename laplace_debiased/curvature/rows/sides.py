r"""One side of a Kronecker eigenbasis, which may know some of its directions only.

A factor [D, D] of rank r < D has r eigenvectors U [D, r] that mean something. The directions of its
null space are any basis of the complement of U; they share one magnitude. Such a side is *thin*:
what belongs to its directions has r + 1 entries, the last for the complement. In place of a basis
of D − r more columns stands the projection on the complement, U' = I − U Uᵀ: with E = [U, U'],
E Eᵀ = I, and for a complement with one value f₀

    E diag(f_1, …, f_r, f₀, …, f₀) Eᵀ = U diag(f) Uᵀ + f₀ (I − U Uᵀ),

so that E with r + D columns does whatever a full basis does. The part of a vector outside of U is
formed and then squared, not taken from a difference of squares, which would lose its digits.

A basis of G groups is [G, D, r]; a group of lower rank than the others has columns of zeros. None
stands for the identity, which is never thin.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor


def is_thin(basis: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a side has a complement."""
    return basis is not None and basis.shape[-1] < basis.shape[-2]


def split(x: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Uᵀx [..., r] and, of a thin side, what lies outside of U [..., D], of rows x [..., D]."""
    if basis is None:
        return x, None
    inside = x @ basis
    return inside, x - inside @ basis.mT if is_thin(basis) else None


def coordinates(x: Tensor, basis: Tensor | None) -> Tensor:
    """Eᵀx [..., r + D] of rows x [..., D]; Uᵀx where the basis is whole."""
    inside, outside = split(x, basis)
    return inside if outside is None else torch.cat([inside, outside], dim=-1)


def from_coordinates(c: Tensor, basis: Tensor | None) -> Tensor:
    """E c [..., D] of rows c [..., r + D]; U c where the basis is whole."""
    if basis is None:
        return c
    if not is_thin(basis):
        return c @ basis.mT
    inside, outside = c.split([basis.shape[-1], basis.shape[-2]], dim=-1)
    return outside + (inside - outside @ basis) @ basis.mT


def repeat_last(values: Tensor, times: int, dim: int = -1) -> Tensor:
    """Values with the last along an axis so many times."""
    shape = list(values.shape)
    shape[dim] = times - 1
    return torch.cat([values, values.narrow(dim, -1, 1).expand(shape)], dim=dim)


def spread(values: Tensor, basis: Tensor | None, dim: int = -1) -> Tensor:
    """Values of a side, as values per column of E: the complement's D times."""
    if not is_thin(basis):
        return values
    return repeat_last(values, basis.shape[-2], dim)


def energies(x: Tensor, basis: Tensor | None) -> Tensor:
    """(u_iᵀx)² of rows x [..., D]; of a thin side, last the squared norm outside of U."""
    inside, outside = split(x, basis)
    squares = inside.square()
    if outside is None:
        return squares
    return torch.cat([squares, outside.square().sum(-1, keepdim=True)], dim=-1)


def entry_squares(basis: Tensor) -> Tensor:
    """Squared entries [..., D, r]; of a thin side [..., D, r + 1], each row then sums to 1."""
    squares = basis.square()
    if not is_thin(basis):
        return squares
    return torch.cat([squares, (1.0 - squares.sum(-1, keepdim=True)).clamp_min(0.0)], dim=-1)


def multiplicities(basis: Tensor) -> Tensor:
    """How many directions each value of a thin side stands for [..., r + 1]; they sum to D."""
    kept = (basis.square().sum(-2) > 0.5).to(basis)
    return torch.cat([kept, basis.shape[-2] - kept.sum(-1, keepdim=True)], dim=-1)


def table_multiplicities(
    table: Tensor, output_basis: Tensor | None, input_basis: Tensor | None
) -> Tensor:
    """Number of directions that every entry of a table stands for."""
    counts = torch.ones_like(table)
    if is_thin(output_basis):
        own = multiplicities(output_basis)
        counts = counts * (own if counts.ndim == 1 else own.unsqueeze(-1))
    if is_thin(input_basis):
        counts = counts * multiplicities(input_basis).unsqueeze(-2)
    return counts


def mean_energies(sums: Tensor, basis: Tensor | None, dim: int = -1) -> Tensor:
    """Sums of energies per value of a side as means per direction."""
    if not is_thin(basis):
        return sums
    values, counts = sums.movedim(dim, -1), multiplicities(basis)
    if counts.ndim < values.ndim:
        counts = counts.unsqueeze(-2)
    means = values / counts.clamp_min(1.0)
    return torch.where(counts > 0, means, means[..., -1:]).movedim(-1, dim)
