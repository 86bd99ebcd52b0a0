"""Rows of one parameter that several calls read, each in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from laplace_debiased.curvature.rows.base import Basis, BlockRows, FactorRule
from laplace_debiased.curvature.rows.matrix import MatrixRows
from laplace_debiased.curvature.rows.rotated import RotatedRows
from laplace_debiased.curvature.rows.size import RowsSize
from laplace_debiased.curvature.rows.tokens import TokenRows
from laplace_debiased.curvature.rows.vectors import VectorRows

MapRows = MatrixRows | TokenRows


def joined_rows(parts: Sequence[BlockRows]) -> BlockRows:
    """Rows of all calls of one parameter together: gradients add up.

    Maps of one orientation become a map with more positions, others a :class:`MixedRows`. What is
    a map here and a vector there is written out.
    """
    first, *others = parts
    if not others:
        return first
    kinds = {(type(part), getattr(part, "transposed", False)) for part in parts}
    if len(kinds) == 1:
        return first.joined(others)
    if all(isinstance(part, MatrixRows | TokenRows) for part in parts):
        return MixedRows(tuple(parts))  # type: ignore[arg-type]
    gradients = [part.gradients() for part in parts]
    return VectorRows(torch.stack(gradients).sum(0))


@dataclass(frozen=True, eq=False)
class MixedRows:
    """A parameter [D_0, D_1] that is a table here and a linear map there, or a map both ways.

    Each part adds Σ_t l_t r_tᵀ to the gradient; which of l and r is the same for all columns
    differs from part to part. So every column of a sample is taken for a sample of its own, whose
    positions are those of all parts.

    Attributes:
        parts: rows of the calls, of the same m samples and R columns.
    """

    parts: tuple[MapRows, ...]

    transposed = False

    @property
    def columns(self) -> Tensor:
        return self.parts[0].columns

    @property
    def extent(self) -> RowsSize:
        positions = sum(part.columns.shape[2] for part in self.parts)
        first = self.parts[0]
        width = first.columns.shape[-1]
        other = first.size if isinstance(first, TokenRows) else first.read.shape[-1]
        left, right = (other, width) if first.transposed else (width, other)
        return RowsSize(positions, left, right, own_inputs=True)

    def select(self, index: Tensor | slice) -> MixedRows:
        return replace(self, parts=tuple(part.select(index) for part in self.parts))

    def joined(self, others: Sequence[BlockRows]) -> BlockRows:
        return joined_rows([*self.parts, *others])

    def column_factor(self, rule: FactorRule) -> Tensor:
        raise TypeError("columns of different parts act on different sides; ask each part.")

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        repeated = coefficients.repeat_interleave(self.columns.shape[1])
        return self._as_samples().curvature(basis, repeated)

    def rotated(self, basis: Basis) -> RotatedRows:
        found = self._as_samples().rotated(basis)
        written = found if isinstance(found, RotatedRows) else found.expanded()
        return replace(written, values=self._per_column(written.values))

    def gradients(self) -> Tensor:
        return self._per_column(self._as_samples().gradients())

    def _per_column(self, values: Tensor) -> Tensor:
        """Values [m·R, 1, K] as [m, R, K]."""
        return values.reshape(*self.columns.shape[:2], -1)

    def _as_samples(self) -> MatrixRows:
        """The rows as those of m·R samples with one column each."""
        sides = [_sides(part) for part in self.parts]
        left = torch.cat([left for left, _ in sides], dim=2)
        right = torch.cat([right for _, right in sides], dim=2)
        return MatrixRows(right.flatten(0, 1), left.flatten(0, 1).unsqueeze(1))


def _sides(part: MapRows) -> tuple[Tensor, Tensor]:
    """L [m, R, T, D_0] and r [m, R, T, D_1] with the part's rows Σ_t l rᵀ."""
    g = part.columns
    if isinstance(part, TokenRows):
        hot = one_hot(part.tokens.clamp_min(0), part.size).to(g)
        a = hot * (part.tokens >= 0).unsqueeze(-1)
    else:
        a = part.read
    a = a.unsqueeze(1).expand(-1, g.shape[1], -1, -1)
    return (a, g) if part.transposed else (g, a)
