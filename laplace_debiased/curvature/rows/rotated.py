"""Rows of one parameter tensor in an eigenbasis, and what two columns have in common there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_debiased.curvature.rows.products import Weights, pair_sums


@dataclass(frozen=True, eq=False)
class RotatedRows:
    """Rows of a block in an eigenbasis.

    Attributes:
        values: [m, R, K]; K = P, or fewer where a sample touches some rows of the parameter only.
        shape: of the block's eigenvalue table.
        touched: rows of the table [m, L] that ``values`` [m, R, L·D] belong to; None for all.
        spreads: for the last axes of the table, how many of the values its last entry is of: 1, or
            D where that side is thin (see :mod:`sides`).
    """

    values: Tensor
    shape: tuple[int, ...]
    touched: Tensor | None = None
    spreads: tuple[int, ...] = ()

    def entries(self, table: Tensor) -> Tensor:
        """Entries of a table that belong to ``values``: [K], or [m, K] where rows are touched."""
        table = spread_last(table, self.spreads)
        return table.flatten() if self.touched is None else table[self.touched].flatten(1)

    @property
    def nbytes(self) -> int:
        """Bytes that all columns take."""
        return self.values.nbytes

    def beside(self, others: Sequence[RotatedRows]) -> RotatedRows:
        """With further columns of the same samples."""
        return replace(self, values=torch.cat([self.values, *(r.values for r in others)], 1))

    def sharing(self, other: RotatedRows) -> RotatedRows:
        """The same, with what does not depend on columns held once."""
        return replace(self, touched=other.touched)

    def per_position(self, n_outputs: int) -> RotatedRows:
        """Rows of samples with outputs at L positions, R = L·C, as those of m·L samples."""
        times = self.values.shape[1] // n_outputs
        if times == 1:
            return self
        values = self.values.reshape(-1, n_outputs, self.values.shape[2])
        touched = None if self.touched is None else self.touched.repeat_interleave(times, 0)
        return replace(self, values=values, touched=touched)

    def products(self, other: RotatedRows, weights: Weights, *, diagonal: bool) -> Tensor:
        """Σ over directions of weight · row_r · row_r' for each of W weights.

        Args:
            other: rows r' of the same samples; the same object for all pairs of one set.
            weights: of the directions of the table.
            diagonal: only r = r'.

        Returns:
            [W, m, R] or [W, m, R, R'].
        """
        table = weights.of(self.entries(weights.eigenvalues)).tables()
        return pair_sums(self.values, other.values, table, diagonal, other is self)

    def written_out(self) -> Tensor:
        """[m, R, P], zero where a sample touches nothing."""
        if self.touched is None:
            return self.values
        rows = self.values.unflatten(2, (self.touched.shape[1], -1))
        full = rows.new_zeros(*rows.shape[:2], *self.shape)
        index = self.touched[:, None, :, None].expand_as(rows)
        return full.scatter_add(2, index, rows).flatten(2)


@dataclass(frozen=True, eq=False)
class RankOneRows:
    """Rows of a block in an eigenbasis that are outer products g_{n,r} a_nᵀ (single position).

    Attributes:
        columns: [m, R, I].
        inputs: [m, J].
        transposed: whether the block's table is [J, I] and not [I, J].
        spread: how many of the I the last entry of the table's side is of: see
            :class:`RotatedRows`.
        inputs_rest: what of the inputs lies outside of a thin side [m, D_in].
    """

    columns: Tensor
    inputs: Tensor
    transposed: bool = False
    spread: int = 1
    inputs_rest: Tensor | None = None

    def entries(self, table: Tensor) -> Tensor:
        """The table as [I, J]; a thin side counts as one entry."""
        return table.mT if self.transposed else table

    @property
    def nbytes(self) -> int:
        """Bytes that all columns take."""
        return self.columns.nbytes

    def beside(self, others: Sequence[RankOneRows]) -> RankOneRows:
        """With further columns of the same samples."""
        return replace(self, columns=torch.cat([self.columns, *(r.columns for r in others)], 1))

    def sharing(self, other: RankOneRows) -> RankOneRows:
        """The same, with what does not depend on columns held once."""
        return replace(self, inputs=other.inputs, inputs_rest=other.inputs_rest)

    def per_position(self, n_outputs: int) -> RankOneRows:
        """Rows of samples with outputs at L positions, R = L·C, as those of m·L samples."""
        times = self.columns.shape[1] // n_outputs
        if times == 1:
            return self
        rest = self.inputs_rest
        return replace(
            self,
            columns=self.columns.reshape(-1, n_outputs, self.columns.shape[2]),
            inputs=self.inputs.repeat_interleave(times, 0),
            inputs_rest=None if rest is None else rest.repeat_interleave(times, 0),
        )

    def input_squares(self) -> Tensor:
        """Squares of the inputs [m, J], last those outside of a thin side."""
        squares = self.inputs.square()
        if self.inputs_rest is None:
            return squares
        return torch.cat([squares, self.inputs_rest.square().sum(-1, keepdim=True)], dim=-1)

    def products(self, other: RankOneRows, weights: Weights, *, diagonal: bool) -> Tensor:
        """See :meth:`RotatedRows.products`; the sum over inputs is taken first."""
        squares, weights = self.input_squares(), weights.of(self.entries(weights.eigenvalues))
        found = []
        for table in weights.each():
            scale = spread_last(squares @ table.mT, (self.spread,))
            if diagonal:
                product = (self.columns.square() @ scale.unsqueeze(-1)).squeeze(-1)
            else:
                product = (self.columns * scale.unsqueeze(1)) @ other.columns.mT
            found.append(product)
        return torch.stack(found)

    def expanded(self) -> RotatedRows:
        """Written out."""
        rest = self.inputs_rest
        inputs = self.inputs if rest is None else torch.cat([self.inputs, rest], dim=-1)
        rows = torch.einsum("mri,mj->mrij", self.columns, inputs)
        spreads = self.spread, 1 if rest is None else rest.shape[-1]
        if self.transposed:
            rows, spreads = rows.mT, spreads[::-1]
        return RotatedRows(rows.flatten(2), tuple(rows.shape[2:]), spreads=spreads)


def spread_last(table: Tensor, spreads: Sequence[int]) -> Tensor:
    """A table with the last entry of its last axes repeated: ``spreads`` times in all."""
    for axis, times in zip(range(-len(spreads), 0), spreads, strict=True):
        if times > 1:
            head, last = table.split([table.shape[axis] - 1, 1], dim=axis)
            shape = list(last.shape)
            shape[axis] = times
            table = torch.cat([head, last.expand(shape)], dim=axis)
    return table
