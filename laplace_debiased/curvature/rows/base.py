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
from torch.nn.functional import pad

from laplace_debiased.curvature import kernels
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor, dense, gram_of_rows
from laplace_debiased.curvature.rows.positions import PositionRows
from laplace_debiased.curvature.rows.rotated import RankOneRows, RotatedRows
from laplace_debiased.curvature.rows.size import Basis, RowsSize
from laplace_debiased.network.transforms import vmap


@dataclass(frozen=True, eq=False)
class FactorRule:
    """How factors are summed up.

    Attributes:
        summed_bias: whether a bias factor sums over positions before the outer product.
    """

    summed_bias: bool = True


class BlockRows(Protocol):
    """Rows of one parameter tensor for m samples and R columns."""

    @property
    def columns(self) -> Tensor:
        """The back-propagated columns, in the layout of the class."""

    @property
    def transposed(self) -> bool:
        """Whether columns act on the columns of the parameter as a matrix, not on its rows."""

    @property
    def extent(self) -> RowsSize:
        """What the rows of one sample are made of."""

    def select(self, index: Tensor | slice) -> BlockRows:
        """Those samples."""

    def joined(self, others: Sequence[BlockRows]) -> BlockRows:
        """With the rows of further calls of the module: gradients add up."""

    def column_factor(self, rule: FactorRule) -> Factor:
        """Factor of the columns, summed over samples and columns."""

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        """Σ_n c_n Σ_r (uᵀ G_{n,r})² along every direction, in the shape of the table."""

    def rotated(self, basis: Basis) -> RotatedRows | RankOneRows | PositionRows:
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


def input_factor(a: Tensor, counts: Tensor | None = None) -> Factor:
    """Input factor [D_in, D_in] of inputs [m, T, D_in], summed over samples.

    Every position counts as a sample of its own (K-FAC "expand", Eschenhagen et al. 2023).

    Args:
        a: the inputs; of G groups [G, m, T, D_in], which have a factor each.
        counts: multiplicity of every sample [m]; None for ones.

    Returns:
        The factor, as its rows where they are fewer than D_in.
    """
    m, positions, width = a.shape[-3:]
    if m * positions < width:
        scales = a.new_ones(m) if counts is None else counts.to(a)
        rows = a * (scales / positions).sqrt().reshape(m, 1, 1)
        return RowsFactor(rows.flatten(-3, -2))
    if a.ndim == 3:
        return kernels.input_covariance(a, counts)
    return vmap(lambda part: kernels.input_covariance(part, counts))(a)


def column_gram(columns: Tensor) -> Factor:
    """Σ g gᵀ [D, D] of columns g [m, R, T, D]; of G groups [G, m, R, T, D], one each."""
    return gram_of_rows(columns.flatten(-4, -2))


def stacked(factors: Sequence[Factor]) -> Factor:
    """Factors of one side each, as those of the groups of one parameter [G, D, D]."""
    parts = [factor.rows for factor in factors if isinstance(factor, RowsFactor)]
    if len(parts) < len(factors):
        return torch.stack([dense(factor) for factor in factors])
    length = max(part.shape[-2] for part in parts)
    return RowsFactor(torch.stack([pad(part, (0, 0, 0, length - len(part))) for part in parts]))
