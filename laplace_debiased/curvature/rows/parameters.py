"""The kinds of rows: what a chunk's pull-backs in one parameter are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from laplace_debiased.curvature import kernels
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import Factor, column_gram
from laplace_debiased.curvature.rows.rotated import (
    PositionRows,
    RankOneRows,
    RotatedRows,
    weight_curvature,
)
from laplace_debiased.curvature.rows.sides import coordinates, energies, is_thin, split
from laplace_debiased.curvature.rows.size import Basis, RowsSize
from laplace_debiased.network.transforms import vmap


@dataclass(frozen=True, eq=False)
class MatrixRows:
    """A weight that maps inputs at T positions: G_{n,r} = Σ_t g_{n,r,t} a_{n,t}ᵀ.

    With G groups the weights of G independent maps are slices of one parameter, [G, D_out, D_in] in
    all; both tensors then have G in front.

    Attributes:
        inputs: a [m, T, D_in], or what gives them: factors of columns do not ask for them.
        columns: g [m, R, T, D_out].
        transposed: whether the parameter, or every slice of it, is stored as [D_in, D_out].
    """

    inputs: Tensor | Callable[[], Tensor]
    columns: Tensor
    transposed: bool = False

    @cached_property
    def read(self) -> Tensor:
        """The inputs, formed once."""
        return formed(self.inputs)

    @property
    def grouped(self) -> bool:
        """Whether there are groups in front."""
        return self.columns.ndim == 5

    @property
    def extent(self) -> RowsSize:
        g, a = self.columns, self.read
        groups = len(g) if self.grouped else 1
        return RowsSize(g.shape[-2], g.shape[-1], a.shape[-1], groups, self.transposed)

    def select(self, index: Tensor | slice) -> Self:
        at = (slice(None), index) if self.grouped else index
        return replace(self, inputs=lambda: self.read[at], columns=self.columns[at])

    def joined(self, others: Sequence[Any]) -> Self:
        parts = [self, *others]
        inputs = [part.inputs for part in parts]  # to hold no part, with its columns and patches
        return replace(
            self,
            inputs=lambda: torch.cat([formed(a) for a in inputs], -2),
            columns=torch.cat([part.columns for part in parts], -2),
        )

    def column_factor(self, *, summed_bias: bool) -> Factor:
        return column_gram(self.columns)

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        outputs, inputs = self._bases(basis)
        kernel = vmap(weight_curvature, (0, 0, 0, 0, None)) if self.grouped else weight_curvature
        table = kernel(self.read, self.columns, outputs, inputs, coefficients)
        return table.mT if self.transposed else table

    def rotated(self, basis: Basis) -> RotatedRows | RankOneRows | PositionRows:
        outputs, inputs = self._bases(basis)
        a, g = self.read, self.columns
        spreads = _spread(outputs), _spread(inputs)
        if not self.grouped and a.shape[1] == 1:
            a, rest = split(a[:, 0], inputs)
            g = coordinates(g[:, :, 0], outputs)
            return RankOneRows(g, a, self.transposed, spreads[0], rest)
        if not self.grouped and PositionRows.pays(a.shape[1], outputs, inputs):
            return PositionRows.of(a, g, outputs, inputs, self.transposed)
        rows = (vmap(_rotated) if self.grouped else _rotated)(a, g, outputs, inputs)
        return RotatedRows.of(self._as_stored(rows), spreads[::-1] if self.transposed else spreads)

    def gradients(self) -> Tensor:
        kernel = vmap(kernels.weight_gradients) if self.grouped else kernels.weight_gradients
        return self._as_stored(kernel(self.read, self.columns)).flatten(2)

    def _bases(self, basis: Basis) -> tuple[Tensor, Tensor]:
        rows, columns = basis.output_basis, basis.input_basis
        assert rows is not None
        assert columns is not None
        return (columns, rows) if self.transposed else (rows, columns)

    def _as_stored(self, rows: Tensor) -> Tensor:
        """[(G,) m, R, I, J] as the parameter is, [m, R, (G,) I, J]."""
        rows = rows.mT if self.transposed else rows
        return rows.movedim(0, 2) if self.grouped else rows


def formed(inputs: Tensor | Callable[[], Tensor]) -> Tensor:
    """Inputs of rows, or what they are formed from, as a tensor."""
    return inputs if isinstance(inputs, Tensor) else inputs()


def _spread(basis: Tensor | None) -> int:
    """How many entries of rows in a basis share the last value of its side."""
    return basis.shape[-2] if is_thin(basis) else 1


def _rotated(a: Tensor, g: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """U_Bᵀ G U_A, in the coordinates of thin sides where there are any."""
    if is_thin(outputs) or is_thin(inputs):
        return kernels.weight_gradients(coordinates(a, inputs), coordinates(g, outputs))
    return kernels.rotated_gradients(a, g, outputs, inputs)


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

    def joined(self, others: Sequence[Any]) -> TokenRows:
        parts = [self, *others]
        return replace(
            self,
            tokens=torch.cat([part.tokens for part in parts], 1),
            columns=torch.cat([part.columns for part in parts], 2),
        )

    def column_factor(self, *, summed_bias: bool) -> Factor:
        return column_gram(self.columns * (self.tokens >= 0)[:, None, :, None])

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        touched, rows = per_token(self.tokens, self.columns)
        rows = energies(rows, basis.input_basis)
        squares = rows.sum(1) * coefficients.to(rows)[:, None, None]
        table = rows.new_zeros(self.size, rows.shape[-1])
        return table.index_add_(0, touched.flatten(), squares.flatten(0, 1))

    def rotated(self, basis: Basis) -> RotatedRows:
        touched, rows = per_token(self.tokens, self.columns)
        rows = coordinates(rows, basis.input_basis)
        shape, spreads = (self.size, rows.shape[-1]), (_spread(basis.input_basis),)
        return RotatedRows(rows.flatten(2), shape, touched, spreads=spreads)

    def gradients(self) -> Tensor:
        touched, rows = per_token(self.tokens, self.columns)
        return RotatedRows(rows.flatten(2), (self.size, rows.shape[-1]), touched).written_out()


def token_factor(tokens: Tensor, size: int, counts: Tensor) -> Tensor:
    """Diagonal input factor [V] of tokens [m, T]: :func:`input_factor` of one-hot vectors."""
    shares = (tokens >= 0).to(counts) / tokens.shape[1]
    weighted = counts[:, None] * shares
    return counts.new_zeros(size).index_add_(0, tokens.clamp_min(0).flatten(), weighted.flatten())


def per_token(tokens: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [m, L], and sums [m, R, L, D] of values [m, R, T, D] over equal tokens [m, T].

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


MAX_DENSE_VECTOR = 4096
"""Entries of a parameter with written-out gradients up to which its block is dense; beyond, it is
diagonal."""


@dataclass(frozen=True, eq=False)
class VectorRows:
    """A parameter whose gradients are small enough to write out, as a norm's scale and shift.

    Its curvature is summed over positions before anything is squared, so the factor *is* the exact
    block; above ``MAX_DENSE_VECTOR`` entries only its diagonal is kept.

    Attributes:
        columns: G [m, R, P].
    """

    columns: Tensor

    transposed = False

    @property
    def extent(self) -> RowsSize:
        return RowsSize(1, self.columns.shape[-1])

    def select(self, index: Tensor | slice) -> Self:
        return replace(self, columns=self.columns[index])

    def joined(self, others: Sequence[Any]) -> Self:
        return replace(self, columns=self.columns + sum(part.columns for part in others))

    def column_factor(self, *, summed_bias: bool) -> Factor:
        if self.columns.shape[-1] > MAX_DENSE_VECTOR:
            return self.columns.square().sum((0, 1))
        return column_gram(self.columns.unsqueeze(2))

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        squares = energies(self.gradients(), basis.output_basis).sum(1)
        return coefficients.to(squares) @ squares

    def rotated(self, basis: Basis) -> RotatedRows:
        turned = coordinates(self.gradients(), basis.output_basis)
        return RotatedRows.of(turned, (_spread(basis.output_basis),))

    def gradients(self) -> Tensor:
        return self.columns


@dataclass(frozen=True, eq=False)
class BiasRows(VectorRows):
    """A bias that is added at T positions: G_{n,r} = Σ_t g_{n,r,t}.

    Attributes:
        columns: g [m, R, T, D].
    """

    @property
    def extent(self) -> RowsSize:
        return RowsSize(self.columns.shape[2], self.columns.shape[-1])

    def joined(self, others: Sequence[Any]) -> Self:
        parts = [self.columns, *(part.columns for part in others)]
        return replace(self, columns=torch.cat(parts, 2))

    def column_factor(self, *, summed_bias: bool) -> Factor:
        summed = summed_bias and self.columns.shape[2] > 1
        return column_gram(self.columns.sum(2, keepdim=True) if summed else self.columns)

    def gradients(self) -> Tensor:
        return self.columns.sum(2)


def joined_rows(parts: Sequence[BlockRows]) -> BlockRows:
    """Rows of all calls of one parameter together: gradients add up.

    Maps of one orientation become a map with more positions, others a :class:`MixedRows`. What is
    a map here and a vector there is written out.
    """
    first, *others = parts
    if not others:
        return first
    if len({(type(part), part.transposed, part.columns.ndim) for part in parts}) == 1:
        return first.joined(others)
    maps = tuple(part for part in parts if isinstance(part, MatrixRows | TokenRows))
    if len(maps) == len(parts) and all(part.columns.ndim == 4 for part in maps):
        return MixedRows(maps)
    return VectorRows(torch.stack([part.gradients() for part in parts]).sum(0))


@dataclass(frozen=True, eq=False)
class MixedRows:
    """A parameter [D_0, D_1] that is a table here and a linear map there, or a map both ways.

    Each part adds Σ_t l_t r_tᵀ to the gradient; which of l and r is the same for all columns
    differs from part to part. So every column of a sample is taken for a sample of its own, whose
    positions are those of all parts.

    Attributes:
        parts: rows of the calls, of the same m samples and R columns.
    """

    parts: tuple[MatrixRows | TokenRows, ...]

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

    def column_factor(self, *, summed_bias: bool) -> Factor:
        raise TypeError("columns of different parts act on different sides; ask each part.")

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        repeated = coefficients.repeat_interleave(self.columns.shape[1])
        return self._as_samples().curvature(basis, repeated)

    def rotated(self, basis: Basis) -> RotatedRows:
        written = self._as_samples().rotated(basis).expanded()
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


def _sides(part: MatrixRows | TokenRows) -> tuple[Tensor, Tensor]:
    """L [m, R, T, D_0] and r [m, R, T, D_1] with the part's rows Σ_t l rᵀ."""
    g = part.columns
    if isinstance(part, TokenRows):
        hot = one_hot(part.tokens.clamp_min(0), part.size).to(g)
        a = hot * (part.tokens >= 0).unsqueeze(-1)
    else:
        a = part.read
    a = a.unsqueeze(1).expand(-1, g.shape[1], -1, -1)
    return (a, g) if part.transposed else (g, a)
