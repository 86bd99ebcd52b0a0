r"""Sums over the directions of a block of weight · row · row, under several weights at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights 1 / (λ + δ_w) of a block's directions, under each of several priors.

    Attributes:
        eigenvalues: λ, the block's table or entries of it.
        priors: δ [G]; 0 where it is part of λ.
        alone: whether one more follows, 1 for all directions: no curvature at δ = 1.
    """

    eigenvalues: Tensor
    priors: Tensor
    alone: bool = False

    def of(self, eigenvalues: Tensor) -> Weights:
        """The same of entries of the table."""
        return replace(self, eigenvalues=eigenvalues)

    def each(self) -> Iterator[Tensor]:
        """One at a time, in the shape of the table."""
        for prior in self.priors:
            yield (self.eigenvalues + prior).reciprocal()
        if self.alone:
            yield torch.ones_like(self.eigenvalues)

    def tables(self) -> Tensor:
        """All of them [..., W]."""
        swept = (self.eigenvalues.unsqueeze(-1) + self.priors).reciprocal()
        return torch.cat([swept, torch.ones_like(swept[..., :1])], dim=-1) if self.alone else swept


def pair_sums(
    left: Tensor, right: Tensor, table: Tensor, diagonal: bool, symmetric: bool
) -> Tensor:
    """Σ_k left_ck right_c'k table_kw of rows [m, R, K] and [m, R', K], [W, m, R] or [W, m, R, R'].

    Args:
        left: rows of some columns.
        right: rows of the same or of others.
        table: [K, W], or [m, K, W] where every sample has its own.
        diagonal: only c = c'.
        symmetric: whether c and c' are of the same columns, and can change places.
    """
    if diagonal:
        return ((left * right) @ table).permute(2, 0, 1)
    if table.shape[-1] == 1:
        product = (left * table.squeeze(-1).unsqueeze(-2)) @ right.mT
        return ((product + product.mT) / 2 if symmetric else product).unsqueeze(0)
    result = left.new_empty(*left.shape[:2], right.shape[1], table.shape[-1])
    for c in range(left.shape[1]):
        first = c if symmetric else 0
        products = (left[:, c : c + 1] * right[:, first:]) @ table
        result[:, c, first:] = products
        if symmetric:
            result[:, first:, c] = products
    return result.permute(3, 0, 1, 2)
