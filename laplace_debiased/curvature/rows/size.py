"""How large rows are, for what a pass can hold at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from laplace_debiased.curvature.rows.sides import is_thin


class Basis(Protocol):
    """Eigenbasis of a block; None stands for the identity."""

    @property
    def output_basis(self) -> Tensor | None:
        """Acts on the rows of the parameter as a matrix."""

    @property
    def input_basis(self) -> Tensor | None:
        """Acts on its columns."""


@dataclass(frozen=True)
class RowsSize:
    """What the rows of one sample are made of.

    Attributes:
        positions: T.
        outs: D_out, entries of a column at a position.
        ins: D_in, entries of what is read there; 0 for a vector.
        groups: G.
        transposed: whether columns act on the columns of the parameter as a matrix.
        own_inputs: whether what is read differs from column to column.
        sparse: whether rows are of the table's rows that are read, one a position.
    """

    positions: int
    outs: int
    ins: int = 0
    groups: int = 1
    transposed: bool = False
    own_inputs: bool = False
    sparse: bool = False

    def working(self, basis: Basis | None) -> tuple[int, int]:
        """Entries held while rows are turned into a basis (None: a whole one) and squared.

        Returns:
            What all columns share, and what each column takes.
        """
        rows, columns = (None, None) if basis is None else (basis.output_basis, basis.input_basis)
        if self.transposed:
            rows, columns = columns, rows
        outs, out_rank = _coordinates(self.outs, rows)
        if self.ins == 0:
            lengthwise = self.positions if self.sparse else 1
            return 0, self.positions * self.outs + 3 * lengthwise * outs
        ins, in_rank = _coordinates(self.ins, columns)
        thin = [side.shape[-2] for side in (rows, columns) if is_thin(side)]
        each = self.positions * (self.outs + outs)
        if self.positions > 1 and thin and self.positions <= min(thin):
            each += self.positions * out_rank + 3 * out_rank * in_rank
        elif self.positions > 1:
            # Columns of many positions are summed over them before they are turned.
            summed_first = not thin and self.positions > self.ins
            each = 3 * outs * ins + (self.positions * self.outs if summed_first else each)
        each, read = self.groups * each, self.groups * self.positions * (self.ins + ins)
        return (0, each + 2 * read) if self.own_inputs else (read, each)


def _coordinates(size: int, basis: Tensor | None) -> tuple[int, int]:
    """As many as :func:`sides.coordinates` gives, and the rank of the basis."""
    rank = basis.shape[-1] if is_thin(basis) else size
    return (rank + size if rank < size else size), rank


def largest_basis(bases: Sequence[Basis]) -> Basis:
    """The one of a block's bases that takes the most memory."""

    def columns(basis: Basis) -> int:
        sides = (basis.output_basis, basis.input_basis)
        return sum(side.shape[-1] for side in sides if side is not None)

    return max(bases, key=columns)
