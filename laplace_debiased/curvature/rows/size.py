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
        """Entries that are held while rows are turned into a basis and squared.

        Args:
            basis: the eigenbasis; None for a whole one of this size.

        Returns:
            What all columns share, and what each column takes.
        """
        sides = (None, None) if basis is None else (basis.output_basis, basis.input_basis)
        outs = _Side.of(self.outs, sides[1] if self.transposed else sides[0])
        if self.ins == 0:
            return 0, self._of_vectors(outs)
        ins = _Side.of(self.ins, sides[0] if self.transposed else sides[1])
        read = self.groups * self.positions * (self.ins + ins.coordinates)
        each = self.groups * self._of_maps(outs, ins)
        return (0, each + 2 * read) if self.own_inputs else (read, each)

    def _of_vectors(self, outs: _Side) -> int:
        lengthwise = self.positions if self.sparse else 1
        return self.positions * self.outs + 3 * lengthwise * outs.coordinates

    def _of_maps(self, outs: _Side, ins: _Side) -> int:
        columns = self.positions * self.outs
        turned = columns + self.positions * outs.coordinates
        if self.positions == 1:
            return turned
        thin = [side.size for side in (outs, ins) if side.is_thin]
        if thin and self.positions <= min(thin):
            return turned + self.positions * outs.rank + 3 * outs.rank * ins.rank
        # Columns of many positions are summed over them before they are turned.
        before = turned if thin or self.positions <= self.ins else columns
        return before + 3 * outs.coordinates * ins.coordinates


@dataclass(frozen=True)
class _Side:
    size: int
    rank: int

    @classmethod
    def of(cls, size: int, basis: Tensor | None) -> _Side:
        return cls(size, basis.shape[-1] if is_thin(basis) else size)

    @property
    def is_thin(self) -> bool:
        return self.rank < self.size

    @property
    def coordinates(self) -> int:
        """As many as :func:`sides.coordinates` gives."""
        return self.rank + self.size if self.is_thin else self.size


def largest_basis(bases: Sequence[Basis]) -> Basis:
    """The one of a block's bases that takes the most memory."""

    def columns(basis: Basis) -> int:
        sides = (basis.output_basis, basis.input_basis)
        return sum(side.shape[-1] for side in sides if side is not None)

    return max(bases, key=columns)
