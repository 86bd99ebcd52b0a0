r"""Directional curvature and covariances of a weight whose eigenbasis is thin, over T positions.

With a = a~ + a' and g = g~ + g' split into what the eigenbasis knows and the rest, the energies of
G = Σ_t g_t a_tᵀ outside of it need no array [D_out, D_in], but the positions' Gram matrices:

    ‖u_Bᵀ G'‖² = Σ_{t,t'} g~_t g~_t' (a'_tᵀ a'_t'),   ‖G'‖² = Σ_{t,t'} (g'_tᵀ g'_t') (a'_tᵀ a'_t'),

which is the cheaper way where positions are fewer than D, as they are where a factor lacks rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_debiased.curvature import kernels
from laplace_debiased.curvature.rows.products import Weights, pair_sums
from laplace_debiased.curvature.rows.rotated import RotatedRows
from laplace_debiased.curvature.rows.sides import energies, is_thin, split


def thin_weight_curvature(
    a: Tensor, g: Tensor, output_basis: Tensor, input_basis: Tensor, coefficients: Tensor
) -> Tensor:
    """:func:`kernels.weight_curvature` where a side is thin, its last entries sums.

    Returns:
        [r_out (+ 1), r_in (+ 1)]: Σ_n c_n Σ_r of squares, over the complement added up.
    """
    coefficients = coefficients.to(a.dtype)
    if a.shape[1] == 1:
        outputs = energies(g[:, :, 0], output_basis).sum(1)
        return (outputs * coefficients.unsqueeze(-1)).mT @ energies(a[:, 0], input_basis)
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


@dataclass(frozen=True, eq=False)
class PositionRows:
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

    @classmethod
    def of(
        cls, a: Tensor, g: Tensor, output_basis: Tensor, input_basis: Tensor, transposed: bool
    ) -> PositionRows:
        """Split a [m, T, D_in] and g [m, R, T, D_out]."""
        a, a_rest = split(a, input_basis)
        g, g_rest = split(g, output_basis)
        return cls(a, g, a_rest, g_rest, transposed)

    @property
    def nbytes(self) -> int:
        """Bytes that all columns take."""
        rest = self.columns_rest
        return self.columns.nbytes + (0 if rest is None else rest.nbytes)

    def beside(self, others: Sequence[PositionRows]) -> PositionRows:
        """With further columns of the same samples."""
        rest = [rows.columns_rest for rows in others if rows.columns_rest is not None]
        return replace(
            self,
            columns=torch.cat([self.columns, *(rows.columns for rows in others)], 1),
            columns_rest=None
            if self.columns_rest is None
            else torch.cat([self.columns_rest, *rest], 1),
        )

    def sharing(self, other: PositionRows) -> PositionRows:
        """The same, with what does not depend on columns held once."""
        return replace(self, inputs=other.inputs, inputs_rest=other.inputs_rest)

    @staticmethod
    def pays(positions: int, output_basis: Tensor, input_basis: Tensor) -> bool:
        """Whether a side is thin, and positions are few enough for their Gram matrices."""
        sides = [basis.shape[-2] for basis in (output_basis, input_basis) if is_thin(basis)]
        return bool(sides) and positions <= min(sides)

    def per_position(self, n_outputs: int) -> PositionRows:
        """Rows of samples with outputs at L positions, R = L·C, as those of m·L samples."""
        m, n_columns = self.columns.shape[:2]
        times = n_columns // n_outputs
        if times == 1:
            return self
        rest, g_rest = self.inputs_rest, self.columns_rest
        return replace(
            self,
            inputs=self.inputs.repeat_interleave(times, 0),
            columns=self.columns.reshape(m * times, n_outputs, *self.columns.shape[2:]),
            inputs_rest=None if rest is None else rest.repeat_interleave(times, 0),
            columns_rest=None
            if g_rest is None
            else g_rest.reshape(m * times, n_outputs, *g_rest.shape[2:]),
        )

    def expanded(self) -> RotatedRows:
        """Written out, in the coordinates of :mod:`sides`."""
        a = self.inputs if self.inputs_rest is None else _beside(self.inputs, self.inputs_rest)
        g = self.columns
        g = g if self.columns_rest is None else _beside(g, self.columns_rest)
        rows = kernels.weight_gradients(a, g)
        spreads = _side(self.columns_rest), _side(self.inputs_rest)
        if self.transposed:
            rows, spreads = rows.mT, spreads[::-1]
        return RotatedRows(rows.flatten(2), tuple(rows.shape[2:]), spreads=spreads)

    def written_out(self) -> Tensor:
        """[m, R, K]: every entry of :meth:`expanded`."""
        return self.expanded().values

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


def _beside(inside: Tensor, outside: Tensor) -> Tensor:
    return torch.cat([inside, outside], dim=-1)


def _side(rest: Tensor | None) -> int:
    return 1 if rest is None else rest.shape[-1]
