"""Parameters that are vectors: biases, and the scales and shifts of norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from laplace_debiased.curvature.rows.base import (
    Basis,
    BlockRows,
    FactorRule,
    column_gram,
)
from laplace_debiased.curvature.rows.gram import Factor
from laplace_debiased.curvature.rows.rotated import RotatedRows
from laplace_debiased.curvature.rows.sides import coordinates, energies, is_thin
from laplace_debiased.curvature.rows.size import RowsSize


@dataclass(frozen=True, eq=False)
class _ColumnRows:
    """Rows that are columns alone: there is no input, and so no input factor.

    Attributes:
        columns: [m, R, ...].
    """

    columns: Tensor

    transposed = False

    @property
    def extent(self) -> RowsSize:
        positions = self.columns.shape[2] if self.columns.ndim == 4 else 1
        return RowsSize(positions, self.columns.shape[-1])

    def _turned(self, rows: Tensor, basis: Tensor | None) -> RotatedRows:
        """Rows [m, R, D] in an eigenbasis."""
        turned = coordinates(rows, basis)
        spread = rows.shape[-1] if is_thin(basis) else 1
        return RotatedRows(turned, tuple(turned.shape[2:]), spreads=(spread,))

    def select(self, index: Tensor | slice) -> Self:
        return replace(self, columns=self.columns[index])


@dataclass(frozen=True, eq=False)
class BiasRows(_ColumnRows):
    """A bias that is added at T positions: G_{n,r} = Σ_t g_{n,r,t}.

    Attributes:
        columns: g [m, R, T, D].
    """

    def joined(self, others: Sequence[BlockRows]) -> BiasRows:
        return BiasRows(torch.cat([self.columns, *(p.columns for p in others)], 2))

    def column_factor(self, rule: FactorRule) -> Factor:
        summed = rule.summed_bias and self.columns.shape[2] > 1
        return column_gram(self.columns.sum(2, keepdim=True) if summed else self.columns)

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        squares = energies(self.columns.sum(2), basis.output_basis).sum(1)
        return coefficients.to(squares) @ squares

    def rotated(self, basis: Basis) -> RotatedRows:
        return self._turned(self.columns.sum(2), basis.output_basis)

    def gradients(self) -> Tensor:
        return self.columns.sum(2)


MAX_DENSE_VECTOR = 4096
"""Entries of a parameter with written-out gradients up to which its block is dense; beyond, it is
diagonal."""


@dataclass(frozen=True, eq=False)
class VectorRows(_ColumnRows):
    """A parameter whose gradients are small enough to write out, as a norm's scale and shift.

    Its curvature is summed over positions before anything is squared, so the factor *is* the exact
    block; above ``MAX_DENSE_VECTOR`` entries only its diagonal is kept.

    Attributes:
        columns: G [m, R, P].
    """

    def joined(self, others: Sequence[BlockRows]) -> VectorRows:
        return VectorRows(self.columns + sum(part.columns for part in others))

    def column_factor(self, rule: FactorRule) -> Factor:
        if self.columns.shape[-1] > MAX_DENSE_VECTOR:
            return self.columns.square().sum((0, 1))
        return column_gram(self.columns.unsqueeze(2))

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        return coefficients.to(self.columns) @ energies(self.columns, basis.output_basis).sum(1)

    def rotated(self, basis: Basis) -> RotatedRows:
        return self._turned(self.columns, basis.output_basis)

    def gradients(self) -> Tensor:
        return self.columns
