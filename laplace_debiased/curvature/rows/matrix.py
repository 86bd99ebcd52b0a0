"""Weights that map inputs to outputs at shared positions, with or without groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, vmap

from laplace_debiased.curvature import kernels
from laplace_debiased.curvature.rows.base import (
    Basis,
    BlockRows,
    FactorRule,
    RankOneRows,
    RotatedRows,
    required,
    same_kind,
    shared_columns,
)


@dataclass(frozen=True, eq=False)
class _MapRows:
    """What one map and several in one parameter have in common; shapes as in the subclasses."""

    inputs: Tensor | None
    columns: Tensor
    transposed: bool = False

    @property
    def read(self) -> Tensor:
        """The inputs, where they were asked for."""
        return required(self.inputs)

    @property
    def patches(self) -> int:
        return 0 if self.inputs is None else self.inputs.numel()

    def _bases(self, basis: Basis) -> tuple[Tensor, Tensor]:
        rows, columns = basis.output_basis, basis.input_basis
        assert rows is not None
        assert columns is not None
        return (columns, rows) if self.transposed else (rows, columns)


@dataclass(frozen=True, eq=False)
class MatrixRows(_MapRows):
    """A weight that maps inputs at T positions: G_{n,r} = Σ_t g_{n,r,t} a_{n,t}ᵀ.

    Attributes:
        inputs: a [m, T, D_in]; None where only the columns were asked for.
        columns: g [m, R, T, D_out].
        transposed: whether the parameter is stored as [D_in, D_out].
    """

    @property
    def entries(self) -> int:
        g, a = self.columns[:, 0], self.read
        return g.numel() * a.shape[-1] // max(1, g.shape[-2])

    def select(self, index: Tensor | slice) -> MatrixRows:
        return replace(self, inputs=self.read[index], columns=self.columns[index])

    def joined(self, others: Sequence[BlockRows]) -> MatrixRows:
        parts = [self, *same_kind(self, others)]
        return replace(
            self,
            inputs=None if self.inputs is None else torch.cat([part.read for part in parts], 1),
            columns=torch.cat([part.columns for part in parts], 2),
        )

    def column_factor(self, rule: FactorRule) -> Tensor:
        return kernels.output_covariance(shared_columns(self.columns, rule.sharing))

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        outputs, inputs = self._bases(basis)
        table = kernels.weight_curvature(self.read, self.columns, outputs, inputs, coefficients)
        return table.mT if self.transposed else table

    def rotated(self, basis: Basis) -> RotatedRows | RankOneRows:
        outputs, inputs = self._bases(basis)
        if self.read.shape[1] == 1:
            a, g = self.read[:, 0] @ inputs, self.columns[:, :, 0] @ outputs
            return RankOneRows(g, a, self.transposed)
        rows = kernels.rotated_gradients(self.read, self.columns, outputs, inputs)
        return self._written(rows)

    def gradients(self) -> Tensor:
        return self._written(kernels.weight_gradients(self.read, self.columns)).values

    def _written(self, rows: Tensor) -> RotatedRows:
        rows = rows.mT if self.transposed else rows
        return RotatedRows(rows.flatten(2), tuple(rows.shape[2:]))


@dataclass(frozen=True, eq=False)
class GroupedRows(_MapRows):
    """G independent maps whose weights are slices of one parameter, [G, D_out, D_in] in all.

    Attributes:
        inputs: a [G, m, T, D_in]; None where only the columns were asked for.
        columns: g [G, m, R, T, D_out].
        transposed: whether every slice is stored as [D_in, D_out].
    """

    @property
    def entries(self) -> int:
        g, a = self.columns[:, :, 0], self.read
        return g.numel() * a.shape[-1] // max(1, g.shape[-2])

    def select(self, index: Tensor | slice) -> GroupedRows:
        return replace(self, inputs=self.read[:, index], columns=self.columns[:, index])

    def joined(self, others: Sequence[BlockRows]) -> GroupedRows:
        parts = [self, *same_kind(self, others)]
        return replace(
            self,
            inputs=None if self.inputs is None else torch.cat([part.read for part in parts], 2),
            columns=torch.cat([part.columns for part in parts], 3),
        )

    def column_factor(self, rule: FactorRule) -> Tensor:
        return vmap(lambda g: kernels.output_covariance(shared_columns(g, rule.sharing)))(
            self.columns
        )

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        outputs, inputs = self._bases(basis)
        kernel = vmap(kernels.weight_curvature, (0, 0, 0, 0, None))
        table = kernel(self.read, self.columns, outputs, inputs, coefficients)
        return table.mT if self.transposed else table

    def rotated(self, basis: Basis) -> RotatedRows:
        outputs, inputs = self._bases(basis)
        return self._written(
            vmap(kernels.rotated_gradients)(self.read, self.columns, outputs, inputs)
        )

    def gradients(self) -> Tensor:
        return self._written(vmap(kernels.weight_gradients)(self.read, self.columns)).values

    def _written(self, rows: Tensor) -> RotatedRows:
        rows = (rows.mT if self.transposed else rows).movedim(0, 2)
        return RotatedRows(rows.flatten(2), tuple(rows.shape[2:]))
