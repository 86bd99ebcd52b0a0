r"""Rows of one parameter tensor in an eigenbasis, and what two columns have in common there.

With a thin eigenbasis a = a~ + a' and g = g~ + g' are split into what it knows and the rest. The
energies of G = Σ_t g_t a_tᵀ outside of it need no array [D_out, D_in], but the positions' Gram
matrices:

    ‖u_Bᵀ G'‖² = Σ_{t,t'} g~_t g~_t' (a'_tᵀ a'_t'),   ‖G'‖² = Σ_{t,t'} (g'_tᵀ g'_t') (a'_tᵀ a'_t'),

which is the cheaper way where positions are fewer than D, as they are where a factor lacks rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from laplace_debiased.curvature import kernels
from laplace_debiased.curvature.rows.sides import energies, is_thin, repeat_last, split


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights 1 / (λ + δ_w) of a block's directions, under each of several priors.

    Attributes:
        eigenvalues: λ, the block's table or entries of it.
        priors: δ [G]; 0 where it is part of λ.
        alone: whether one more follows, 1 for all directions: no curvature at δ = 1.
    """

    eigenvalues: Tensor
    priors: Tensor
    alone: bool = False

    def of(self, eigenvalues: Tensor) -> Weights:
        """The same of entries of the table."""
        return replace(self, eigenvalues=eigenvalues)

    def each(self) -> Iterator[Tensor]:
        """One at a time, in the shape of the table."""
        for prior in self.priors:
            yield (self.eigenvalues + prior).reciprocal()
        if self.alone:
            yield torch.ones_like(self.eigenvalues)

    def tables(self) -> Tensor:
        """All of them [..., W]."""
        swept = (self.eigenvalues.unsqueeze(-1) + self.priors).reciprocal()
        return torch.cat([swept, torch.ones_like(swept[..., :1])], dim=-1) if self.alone else swept


def pair_sums(
    left: Tensor, right: Tensor, table: Tensor, diagonal: bool, symmetric: bool
) -> Tensor:
    """Σ_k left_ck right_c'k table_kw of rows [m, R, K] and [m, R', K], [W, m, R] or [W, m, R, R'].

    The table is [K, W], or [m, K, W] where every sample has its own. ``diagonal``: only c = c';
    ``symmetric``: c and c' are of the same columns, and can change places.
    """
    if diagonal:
        return ((left * right) @ table).permute(2, 0, 1)
    if table.shape[-1] == 1:
        product = (left * table.squeeze(-1).unsqueeze(-2)) @ right.mT
        return ((product + product.mT) / 2 if symmetric else product).unsqueeze(0)
    result = left.new_empty(*left.shape[:2], right.shape[1], table.shape[-1])
    for c in range(left.shape[1]):
        first = c if symmetric else 0
        products = (left[:, c : c + 1] * right[:, first:]) @ table
        result[:, c, first:] = products
        if symmetric:
            result[:, first:, c] = products
    return result.permute(3, 0, 1, 2)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Tensors of every column [m, R, ...] and of every sample [m, ...], by attribute; some None."""

    of_columns: ClassVar[tuple[str, ...]]
    of_samples: ClassVar[tuple[str, ...]]

    def _known(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes that all columns take."""
        return sum(value.nbytes for value in self._known(self.of_columns).values())

    def beside(self, others: Sequence[Self]) -> Self:
        """With further columns of the same samples."""
        parts = [self._known(self.of_columns), *(rows._known(self.of_columns) for rows in others)]
        return replace(self, **{n: torch.cat([part[n] for part in parts], 1) for n in parts[0]})

    def sharing(self, other: Self) -> Self:
        """The same, with what does not depend on columns held once."""
        return replace(self, **{name: getattr(other, name) for name in self.of_samples})

    def per_position(self, n_outputs: int) -> Self:
        """Rows of samples with outputs at L positions, R = L·C, as those of m·L samples."""
        columns, samples = self._known(self.of_columns), self._known(self.of_samples)
        times = next(iter(columns.values())).shape[1] // n_outputs
        if times == 1:
            return self
        found = {n: v.reshape(-1, n_outputs, *v.shape[2:]) for n, v in columns.items()}
        found |= {name: value.repeat_interleave(times, 0) for name, value in samples.items()}
        return replace(self, **found)


@dataclass(frozen=True, eq=False)
class RotatedRows(_Rows):
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

    of_columns = ("values",)
    of_samples = ("touched",)

    @classmethod
    def of(cls, rows: Tensor, spreads: tuple[int, ...]) -> RotatedRows:
        """Of rows [m, R, *table]."""
        return cls(rows.flatten(2), tuple(rows.shape[2:]), spreads=spreads)

    def entries(self, table: Tensor) -> Tensor:
        """Entries of a table that belong to ``values``: [K], or [m, K] where rows are touched."""
        table = spread_last(table, self.spreads)
        return table.flatten() if self.touched is None else table[self.touched].flatten(1)

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

    def expanded(self) -> RotatedRows:
        """As they are."""
        return self

    def written_out(self) -> Tensor:
        """[m, R, P], zero where a sample touches nothing."""
        if self.touched is None:
            return self.values
        rows = self.values.unflatten(2, (self.touched.shape[1], -1))
        full = rows.new_zeros(*rows.shape[:2], *self.shape)
        index = self.touched[:, None, :, None].expand_as(rows)
        return full.scatter_add(2, index, rows).flatten(2)


@dataclass(frozen=True, eq=False)
class RankOneRows(_Rows):
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

    of_columns = ("columns",)
    of_samples = ("inputs", "inputs_rest")

    def products(self, other: RankOneRows, weights: Weights, *, diagonal: bool) -> Tensor:
        """See :meth:`RotatedRows.products`; the sum over inputs is taken first."""
        squares, table = self.inputs.square(), weights.eigenvalues
        if self.inputs_rest is not None:
            outside = self.inputs_rest.square().sum(-1, keepdim=True)
            squares = torch.cat([squares, outside], dim=-1)
        found = []
        for each in weights.of(table.mT if self.transposed else table).each():
            scale = spread_last(squares @ each.mT, (self.spread,))
            if diagonal:
                product = (self.columns.square() @ scale.unsqueeze(-1)).squeeze(-1)
            else:
                product = (self.columns * scale.unsqueeze(1)) @ other.columns.mT
            found.append(product)
        return torch.stack(found)

    def expanded(self) -> RotatedRows:
        """Written out."""
        rows = self.columns.unsqueeze(-1) * _beside(self.inputs, self.inputs_rest)[:, None, None]
        spreads = self.spread, _side(self.inputs_rest)
        return _table_order(rows, spreads, self.transposed)


@dataclass(frozen=True, eq=False)
class PositionRows(_Rows):
    """Rows Σ_t g_{n,r,t} a_{n,t}ᵀ of a weight with a thin side, T positions.

    Attributes:
        inputs: a~ [m, T, J].
        columns: g~ [m, R, T, I].
        inputs_rest: a' [m, T, D_in], where that side is thin.
        columns_rest: g' [m, R, T, D_out], where that side is thin.
        transposed: whether the block's table is [J, I] and not [I, J].
    """

    inputs: Tensor
    columns: Tensor
    inputs_rest: Tensor | None
    columns_rest: Tensor | None
    transposed: bool = False

    of_columns = ("columns", "columns_rest")
    of_samples = ("inputs", "inputs_rest")

    @classmethod
    def of(
        cls, a: Tensor, g: Tensor, output_basis: Tensor, input_basis: Tensor, transposed: bool
    ) -> PositionRows:
        """Split a [m, T, D_in] and g [m, R, T, D_out]."""
        a, a_rest = split(a, input_basis)
        g, g_rest = split(g, output_basis)
        return cls(a, g, a_rest, g_rest, transposed)

    @staticmethod
    def pays(positions: int, output_basis: Tensor, input_basis: Tensor) -> bool:
        """Whether a side is thin, and positions are few enough for their Gram matrices."""
        sides = [basis.shape[-2] for basis in (output_basis, input_basis) if is_thin(basis)]
        return bool(sides) and positions <= min(sides)

    def expanded(self) -> RotatedRows:
        """Written out, in the coordinates of :mod:`sides`."""
        a = _beside(self.inputs, self.inputs_rest)
        rows = kernels.weight_gradients(a, _beside(self.columns, self.columns_rest))
        spreads = _side(self.columns_rest), _side(self.inputs_rest)
        return _table_order(rows, spreads, self.transposed)

    def products(self, other: PositionRows, weights: Weights, *, diagonal: bool) -> Tensor:
        """See :meth:`RotatedRows.products`."""
        tables = weights.tables().movedim(-1, 0)
        tables = tables.mT if self.transposed else tables
        symmetric = other is self
        a, g, h = self.inputs, self.columns, other.columns
        n_out, n_in = g.shape[-1], a.shape[-1]
        rows = kernels.weight_gradients(a, g).flatten(2)
        others = rows if symmetric else kernels.weight_gradients(a, h).flatten(2)
        inside = tables[:, :n_out, :n_in].flatten(1).mT
        total = pair_sums(rows, others, inside, diagonal, symmetric)
        gram = None if self.inputs_rest is None else self.inputs_rest @ self.inputs_rest.mT
        if gram is not None:
            table = tables[:, :n_out, -1].repeat(1, g.shape[2]).mT
            mixed = (gram.unsqueeze(1) @ h).flatten(2)
            total = total + pair_sums(g.flatten(2), mixed, table, diagonal, symmetric)
        if self.columns_rest is not None and other.columns_rest is not None:
            mixing = (a * tables[:, -1, :n_in].reshape(-1, 1, 1, n_in)) @ a.mT  # [W, m, T, T]
            if gram is not None:
                mixing = mixing + tables[:, -1, -1].reshape(-1, 1, 1, 1) * gram
            rest = self.columns_rest, other.columns_rest
            total = total + _mixed_positions(*rest, mixing, diagonal, symmetric)
        return total


def _mixed_positions(
    g: Tensor, h: Tensor, mixing: Tensor, diagonal: bool, symmetric: bool
) -> Tensor:
    """Σ_{t,t'} M_w[t, t'] g_ctᵀ h_c't' of [m, R, T, D] each and symmetric M [W, m, T, T]."""
    if diagonal:
        return torch.einsum("wmst,mcst->wmc", mixing, g @ h.mT)
    if len(mixing) == 1:
        product = g.flatten(2) @ (mixing[0].unsqueeze(1) @ h).flatten(2).mT
        return ((product + product.mT) / 2 if symmetric else product).unsqueeze(0)
    flat = mixing.flatten(2).permute(1, 2, 0)  # [m, T·T, W]
    result = g.new_empty(*g.shape[:2], h.shape[1], len(mixing))
    for c in range(g.shape[1]):
        first = c if symmetric else 0
        grams = g[:, c : c + 1] @ h[:, first:].mT
        products = (grams + grams.mT).flatten(2) @ flat / 2
        result[:, c, first:] = products
        if symmetric:
            result[:, first:, c] = products
    return result.permute(3, 0, 1, 2)


def _beside(inside: Tensor, outside: Tensor | None) -> Tensor:
    return inside if outside is None else torch.cat([inside, outside], dim=-1)


def _side(rest: Tensor | None) -> int:
    return 1 if rest is None else rest.shape[-1]


def _table_order(rows: Tensor, spreads: tuple[int, int], transposed: bool) -> RotatedRows:
    """Rows [m, R, I, J] in the order of the block's table."""
    return RotatedRows.of(rows.mT, spreads[::-1]) if transposed else RotatedRows.of(rows, spreads)


def weight_curvature(
    a: Tensor, g: Tensor, output_basis: Tensor, input_basis: Tensor, coefficients: Tensor
) -> Tensor:
    r"""Σ_n c_n Σ_r (u_iᵀ G_{n,r} u_j)² for every direction (i, j); along a thin side, last a sum.

    With c_n = 1/m̃ this is the directional curvature u_ijᵀ G_B̃ u_ij of the generalized
    Gauss-Newton matrix (George et al. 2018, eq. 9). A single position makes G of rank one, and the
    square splits into a product of squares: no gradient is formed.

    Args:
        a: inputs [m, T, D_in].
        g: back-propagated columns [m, R, T, D_out].
        output_basis: U_B [D_out, r_out].
        input_basis: U_A [D_in, r_in].
        coefficients: c [m].

    Returns:
        [r_out (+ 1), r_in (+ 1)].
    """
    coefficients = coefficients.to(a.dtype)
    if a.shape[1] == 1:
        outputs = energies(g[:, :, 0], output_basis).sum(1)
        return (outputs * coefficients.unsqueeze(-1)).mT @ energies(a[:, 0], input_basis)
    if not (is_thin(output_basis) or is_thin(input_basis)):
        squares = kernels.rotated_gradients(a, g, output_basis, input_basis).square().sum(1)
        return torch.tensordot(coefficients, squares, dims=1)
    a, a_rest = split(a, input_basis)
    g, g_rest = split(g, output_basis)
    squares = kernels.weight_gradients(a, g).square().sum(1)
    if a_rest is not None:
        squares = torch.cat([squares, _outside_of_inputs(g, a_rest).unsqueeze(-1)], dim=-1)
    if g_rest is not None:
        last = _outside_of_outputs(g_rest, a)
        if a_rest is not None:
            last = torch.cat([last, _outside_of_both(g_rest, a_rest)], dim=-1)
        squares = torch.cat([squares, last.unsqueeze(-2)], dim=-2)
    return torch.tensordot(coefficients, squares, dims=1)


def _outside_of_inputs(g: Tensor, a_rest: Tensor) -> Tensor:
    """Σ_r ‖Σ_t g_{r,t,i} a'_t‖² [m, I]."""
    if g.shape[2] > a_rest.shape[-1]:
        return kernels.weight_gradients(a_rest, g).square().sum((1, 3))
    gram = (a_rest @ a_rest.mT).unsqueeze(1)
    return (g * (gram @ g)).sum((1, 2)).clamp_min(0.0)


def _outside_of_outputs(g_rest: Tensor, a: Tensor) -> Tensor:
    """Σ_r ‖Σ_t g'_{r,t} a_{t,j}‖² [m, J]."""
    if a.shape[1] > g_rest.shape[-1]:
        return kernels.weight_gradients(a, g_rest).square().sum((1, 2))
    gram = (g_rest @ g_rest.mT).sum(1)
    return (a * (gram @ a)).sum(1).clamp_min(0.0)


def _outside_of_both(g_rest: Tensor, a_rest: Tensor) -> Tensor:
    """Σ_r ‖Σ_t g'_{r,t} a'_tᵀ‖² [m, 1]."""
    if a_rest.shape[1] > max(g_rest.shape[-1], a_rest.shape[-1]):
        return kernels.weight_gradients(a_rest, g_rest).square().sum((1, 2, 3)).unsqueeze(-1)
    gram = (g_rest @ g_rest.mT).sum(1) * (a_rest @ a_rest.mT)
    return gram.sum((1, 2)).clamp_min(0.0).unsqueeze(-1)


def spread_last(table: Tensor, spreads: Sequence[int]) -> Tensor:
    """A table with the last entry of its last axes repeated: ``spreads`` times in all."""
    for axis, times in zip(range(-len(spreads), 0), spreads, strict=True):
        table = repeat_last(table, times, axis) if times > 1 else table
    return table
