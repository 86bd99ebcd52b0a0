"""Weights that map inputs to outputs at shared positions, with or without groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_debiased.curvature import kernels
from laplace_debiased.curvature.rows.base import (
    Basis,
    BlockRows,
    FactorRule,
    column_gram,
    required,
    same_kind,
)
from laplace_debiased.curvature.rows.gram import Factor
from laplace_debiased.curvature.rows.positions import PositionRows, thin_weight_curvature
from laplace_debiased.curvature.rows.rotated import RankOneRows, RotatedRows
from laplace_debiased.curvature.rows.sides import coordinates, is_thin, split
from laplace_debiased.curvature.rows.size import RowsSize
from laplace_debiased.network.transforms import vmap


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
    def extent(self) -> RowsSize:
        g, a = self.columns, self.read
        groups = len(g) if g.ndim == 5 else 1
        return RowsSize(g.shape[-2], g.shape[-1], a.shape[-1], groups, self.transposed)

    def _bases(self, basis: Basis) -> tuple[Tensor, Tensor]:
        rows, columns = basis.output_basis, basis.input_basis
        assert rows is not None
        assert columns is not None
        return (columns, rows) if self.transposed else (rows, columns)

    def _as_stored(
        self, rows: Tensor, outputs: Tensor, inputs: Tensor
    ) -> tuple[Tensor, tuple[int, int]]:
        """Rows [..., I, J] and what thin sides repeat, in the order of the parameter."""
        if self.transposed:
            return rows.mT, (_spread(inputs), _spread(outputs))
        return rows, (_spread(outputs), _spread(inputs))


def _spread(basis: Tensor) -> int:
    return basis.shape[-2] if is_thin(basis) else 1


def _curvature_kernel(outputs: Tensor, inputs: Tensor) -> Callable[..., Tensor]:
    thin = is_thin(outputs) or is_thin(inputs)
    return thin_weight_curvature if thin else kernels.weight_curvature


def _rotated(a: Tensor, g: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """U_Bᵀ G U_A, in the coordinates of thin sides where there are any."""
    if is_thin(outputs) or is_thin(inputs):
        return kernels.weight_gradients(coordinates(a, inputs), coordinates(g, outputs))
    return kernels.rotated_gradients(a, g, outputs, inputs)


@dataclass(frozen=True, eq=False)
class MatrixRows(_MapRows):
    """A weight that maps inputs at T positions: G_{n,r} = Σ_t g_{n,r,t} a_{n,t}ᵀ.

    Attributes:
        inputs: a [m, T, D_in]; None where only the columns were asked for.
        columns: g [m, R, T, D_out].
        transposed: whether the parameter is stored as [D_in, D_out].
    """

    def select(self, index: Tensor | slice) -> MatrixRows:
        return replace(self, inputs=self.read[index], columns=self.columns[index])

    def joined(self, others: Sequence[BlockRows]) -> MatrixRows:
        parts = [self, *same_kind(self, others)]
        return replace(
            self,
            inputs=None if self.inputs is None else torch.cat([part.read for part in parts], 1),
            columns=torch.cat([part.columns for part in parts], 2),
        )

    def column_factor(self, rule: FactorRule) -> Factor:
        return column_gram(self.columns)

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        outputs, inputs = self._bases(basis)
        kernel = _curvature_kernel(outputs, inputs)
        table = kernel(self.read, self.columns, outputs, inputs, coefficients)
        return table.mT if self.transposed else table

    def rotated(self, basis: Basis) -> RotatedRows | RankOneRows | PositionRows:
        outputs, inputs = self._bases(basis)
        positions = self.read.shape[1]
        if positions == 1:
            a, rest = split(self.read[:, 0], inputs)
            g = coordinates(self.columns[:, :, 0], outputs)
            return RankOneRows(g, a, self.transposed, _spread(outputs), rest)
        if PositionRows.pays(positions, outputs, inputs):
            return PositionRows.of(self.read, self.columns, outputs, inputs, self.transposed)
        return self._written(_rotated(self.read, self.columns, outputs, inputs), outputs, inputs)

    def gradients(self) -> Tensor:
        rows = kernels.weight_gradients(self.read, self.columns)
        return (rows.mT if self.transposed else rows).flatten(2)

    def _written(self, rows: Tensor, outputs: Tensor, inputs: Tensor) -> RotatedRows:
        rows, spreads = self._as_stored(rows, outputs, inputs)
        return RotatedRows(rows.flatten(2), tuple(rows.shape[2:]), spreads=spreads)


@dataclass(frozen=True, eq=False)
class GroupedRows(_MapRows):
    """G independent maps whose weights are slices of one parameter, [G, D_out, D_in] in all.

    Attributes:
        inputs: a [G, m, T, D_in]; None where only the columns were asked for.
        columns: g [G, m, R, T, D_out].
        transposed: whether every slice is stored as [D_in, D_out].
    """

    def select(self, index: Tensor | slice) -> GroupedRows:
        return replace(self, inputs=self.read[:, index], columns=self.columns[:, index])

    def joined(self, others: Sequence[BlockRows]) -> GroupedRows:
        parts = [self, *same_kind(self, others)]
        return replace(
            self,
            inputs=None if self.inputs is None else torch.cat([part.read for part in parts], 2),
            columns=torch.cat([part.columns for part in parts], 3),
        )

    def column_factor(self, rule: FactorRule) -> Factor:
        return column_gram(self.columns)

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        outputs, inputs = self._bases(basis)
        kernel = vmap(_curvature_kernel(outputs, inputs), (0, 0, 0, 0, None))
        table = kernel(self.read, self.columns, outputs, inputs, coefficients)
        return table.mT if self.transposed else table

    def rotated(self, basis: Basis) -> RotatedRows:
        outputs, inputs = self._bases(basis)
        rows = vmap(_rotated)(self.read, self.columns, outputs, inputs)
        rows, spreads = self._as_stored(rows, outputs, inputs)
        rows = rows.movedim(0, 2)
        return RotatedRows(rows.flatten(2), tuple(rows.shape[2:]), spreads=spreads)

    def gradients(self) -> Tensor:
        rows = vmap(kernels.weight_gradients)(self.read, self.columns)
        return (rows.mT if self.transposed else rows).movedim(0, 2).flatten(2)
