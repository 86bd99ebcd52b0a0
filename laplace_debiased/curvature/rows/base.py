r"""Rows of one parameter tensor: what a chunk's pull-backs say about its curvature.

A *block* is the curvature of one parameter tensor, P entries in row-major order. Its row for
sample n and column r is the gradient G_{n,r} [P] of that column in the parameter. No class here
holds these rows if it can help it; each holds what they are made of and offers the same
operations: select samples, sum up Kronecker factors, sum up directional curvatures, rotate into an
eigenbasis, and (for tests and checks) write the gradients out.

Factors come from the layer's inputs and from its columns; a square matrix is dense, [G, D, D] one
matrix per group, a vector [D] a diagonal. Where the parameter is a vector there is no input factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from laplace_debiased.curvature import kernels
from laplace_debiased.options import WeightSharing


class Basis(Protocol):
    """Eigenbasis of a block; None stands for the identity."""

    @property
    def output_basis(self) -> Tensor | None:
        """Acts on the rows of the parameter as a matrix."""

    @property
    def input_basis(self) -> Tensor | None:
        """Acts on its columns."""


@dataclass(frozen=True, eq=False)
class FactorRule:
    """How factors are summed up.

    Attributes:
        summed_bias: whether a bias factor sums over positions before the outer product.
        sharing: how positions that share a weight enter its Kronecker factors.
    """

    summed_bias: bool = True
    sharing: WeightSharing = WeightSharing.EXPAND


@dataclass(frozen=True, eq=False)
class RotatedRows:
    """Rows of a block in an eigenbasis.

    Attributes:
        values: [m, R, K]; K = P, or fewer where a sample touches some rows of the parameter only.
        shape: of the block's eigenvalue table.
        touched: rows of the table [m, L] that ``values`` [m, R, L·D] belong to; None for all.
    """

    values: Tensor
    shape: tuple[int, ...]
    touched: Tensor | None = None

    def entries(self, table: Tensor) -> Tensor:
        """Entries of a table that belong to ``values``: [K], or [m, K] where rows are touched."""
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
    """

    columns: Tensor
    inputs: Tensor
    transposed: bool = False

    def entries(self, table: Tensor) -> Tensor:
        """The table as [I, J]."""
        return table.mT if self.transposed else table

    def expanded(self) -> RotatedRows:
        """Written out."""
        rows = torch.einsum("mri,mj->mrij", self.columns, self.inputs)
        rows = rows.mT if self.transposed else rows
        return RotatedRows(rows.flatten(2), tuple(rows.shape[2:]))


class BlockRows(Protocol):
    """Rows of one parameter tensor for m samples and R columns."""

    @property
    def columns(self) -> Tensor:
        """The back-propagated columns, in the layout of the class."""

    @property
    def entries(self) -> int:
        """Numbers that one column's rows take in an eigenbasis, all samples together."""

    @property
    def patches(self) -> int:
        """Numbers that the inputs take, all samples together."""

    def select(self, index: Tensor | slice) -> BlockRows:
        """Those samples."""

    def joined(self, others: Sequence[BlockRows]) -> BlockRows:
        """With the rows of further calls of the module: gradients add up."""

    def column_factor(self, rule: FactorRule) -> Tensor:
        """Factor of the columns, summed over samples and columns."""

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        """Σ_n c_n Σ_r (uᵀ G_{n,r})² along every direction, in the shape of the table."""

    def rotated(self, basis: Basis) -> RotatedRows | RankOneRows:
        """Rows in the eigenbasis."""

    def gradients(self) -> Tensor:
        """G [m, R, P]."""


Rows = TypeVar("Rows")


def same_kind(first: Rows, others: Sequence[BlockRows]) -> list[Rows]:
    """The rows, checked to be of the class of the first.

    Raises:
        TypeError: if they are not.
    """
    if not all(isinstance(part, type(first)) for part in others):
        raise TypeError("cannot join rows of different kinds of layers.")
    return list(others)  # type: ignore[arg-type]


def required(inputs: Tensor | None) -> Tensor:
    """The inputs of rows that were made with them.

    Raises:
        RuntimeError: if they were not.
    """
    if inputs is None:
        raise RuntimeError("these rows were made without inputs; they give column factors only.")
    return inputs


def shared_columns(g: Tensor, sharing: WeightSharing) -> Tensor:
    """Columns [m, R, T, D] as the Kronecker factor sees them (Eschenhagen et al. 2023)."""
    match sharing:
        case WeightSharing.EXPAND:
            return g
        case WeightSharing.REDUCE:
            return g.sum(2, keepdim=True)


def input_factor(a: Tensor, sharing: WeightSharing, counts: Tensor | None = None) -> Tensor:
    """Input factor [D_in, D_in] of inputs [m, T, D_in], summed over samples.

    Args:
        a: the inputs.
        sharing: the mean over positions of the outer products, or the outer product of the means.
        counts: multiplicity of every sample [m]; None for ones.
    """
    match sharing:
        case WeightSharing.EXPAND:
            return kernels.input_covariance(a, counts)
        case WeightSharing.REDUCE:
            return kernels.input_covariance(a.mean(1, keepdim=True), counts)
