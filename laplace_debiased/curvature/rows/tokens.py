"""Tables of which a sample reads some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_debiased.curvature.rows.base import (
    Basis,
    BlockRows,
    FactorRule,
    column_gram,
    same_kind,
)
from laplace_debiased.curvature.rows.gram import Factor
from laplace_debiased.curvature.rows.rotated import RotatedRows
from laplace_debiased.curvature.rows.sides import coordinates, energies, is_thin
from laplace_debiased.curvature.rows.size import RowsSize


@dataclass(frozen=True, eq=False)
class TokenRows:
    """A table [V, D] of which sample n reads row v_{n,t} at position t: G_{n,r} = Σ_t e_v gᵀ.

    The factor of the rows is diagonal, because one-hot vectors are orthogonal; nothing here is of
    size V × V, and no gradient of size V × D.

    Attributes:
        tokens: v [m, T], integers; negative for positions without a gradient.
        columns: g [m, R, T, D].
        size: V.
    """

    tokens: Tensor
    columns: Tensor
    size: int

    transposed = True  # tokens act on the rows of the table

    @property
    def extent(self) -> RowsSize:
        positions, width = self.columns.shape[2:]
        return RowsSize(positions, width, transposed=True, sparse=True)

    def select(self, index: Tensor | slice) -> TokenRows:
        return replace(self, tokens=self.tokens[index], columns=self.columns[index])

    def joined(self, others: Sequence[BlockRows]) -> TokenRows:
        parts = [self, *same_kind(self, others)]
        return replace(
            self,
            tokens=torch.cat([part.tokens for part in parts], 1),
            columns=torch.cat([part.columns for part in parts], 2),
        )

    def column_factor(self, rule: FactorRule) -> Factor:
        kept = self.columns * (self.tokens >= 0)[:, None, :, None]
        return column_gram(kept)

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        touched, rows = per_token(self.tokens, self.columns)
        rows = energies(rows, basis.input_basis)
        squares = rows.sum(1) * coefficients.to(rows)[:, None, None]
        table = rows.new_zeros(self.size, rows.shape[-1])
        return table.index_add_(0, touched.flatten(), squares.flatten(0, 1))

    def rotated(self, basis: Basis) -> RotatedRows:
        touched, rows = per_token(self.tokens, self.columns)
        spread = rows.shape[-1] if is_thin(basis.input_basis) else 1
        rows = coordinates(rows, basis.input_basis)
        shape = (self.size, rows.shape[-1])
        return RotatedRows(rows.flatten(2), shape, touched, spreads=(spread,))

    def gradients(self) -> Tensor:
        touched, rows = per_token(self.tokens, self.columns)
        return RotatedRows(rows.flatten(2), (self.size, rows.shape[-1]), touched).written_out()


def token_factor(tokens: Tensor, size: int, counts: Tensor) -> Tensor:
    """Diagonal input factor [V] of tokens [m, T]: :func:`input_factor` of one-hot vectors."""
    shares = (tokens >= 0).to(counts) / tokens.shape[1]
    weighted = counts[:, None] * shares
    return counts.new_zeros(size).index_add_(0, tokens.clamp_min(0).flatten(), weighted.flatten())


def per_token(tokens: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [m, R, L, D] of values [m, R, T, D] over equal tokens [m, T], and the tokens [m, L].

    Samples with fewer than L distinct tokens are filled up with zero rows of token 0; values of
    negative tokens are dropped.
    """
    m, columns, positions, width = values.shape
    order = tokens.sort(1).values
    first = torch.ones_like(order, dtype=torch.bool)
    first[:, 1:] = order[:, 1:] != order[:, :-1]
    ranks = first.cumsum(1) - 1
    slot = ranks.gather(1, torch.searchsorted(order, tokens.contiguous()))
    length = int(ranks[:, -1].max()) + 1
    touched = order.new_zeros(m, length).scatter(1, slot, tokens.clamp_min(0))
    kept = values * (tokens >= 0)[:, None, :, None]
    index = slot[:, None, :, None].expand(m, columns, positions, width)
    return touched, values.new_zeros(m, columns, length, width).scatter_add(2, index, kept)
