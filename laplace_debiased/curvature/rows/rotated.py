"""Rows of one parameter tensor in an eigenbasis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def input_squares(self) -> Tensor:
        """Squares of the inputs [m, J], last those outside of a thin side."""
        squares = self.inputs.square()
        if self.inputs_rest is None:
            return squares
        return torch.cat([squares, self.inputs_rest.square().sum(-1, keepdim=True)], dim=-1)

    def scales(self, entries: Tensor) -> Tensor:
        """Σ_j a_j² / entries_ij, for every column of ``columns`` [m, I]."""
        return spread_last(self.input_squares() @ entries.reciprocal().mT, (self.spread,))

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
