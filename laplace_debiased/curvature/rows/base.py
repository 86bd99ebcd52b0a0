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
from typing import Any, Protocol

from torch import Tensor

from laplace_debiased.curvature.rows.gram import Factor
from laplace_debiased.curvature.rows.rotated import PositionRows, RankOneRows, RotatedRows
from laplace_debiased.curvature.rows.size import Basis, RowsSize


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

    def joined(self, others: Sequence[Any]) -> BlockRows:
        """With the rows of further calls, of the same class: gradients add up."""

    def column_factor(self, *, summed_bias: bool) -> Factor:
        """Factor of the columns, summed over samples and columns.

        Args:
            summed_bias: whether that of a bias sums over positions before the outer product.
        """

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        """Σ_n c_n Σ_r (uᵀ G_{n,r})² along every direction, in the shape of the table."""

    def rotated(self, basis: Basis) -> RotatedRows | RankOneRows | PositionRows:
        """Rows in the eigenbasis."""

    def gradients(self) -> Tensor:
        """G [m, R, P]."""
