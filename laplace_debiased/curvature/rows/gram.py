"""Kronecker factors that are kept as the rows that they are sums of, while these are few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from laplace_debiased.curvature import kernels
from laplace_debiased.network.transforms import vmap


@dataclass(frozen=True, eq=False)
class RowsFactor:
    """The factor Rᵀ R [D, D], or [G, D, D], of fewer rows than columns; never formed.

    Attributes:
        rows: R [k, D] or [G, k, D], scaled by the square roots of their weights.
    """

    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the factor as a matrix."""
        return (*self.rows.shape[:-2], self.rows.shape[-1], self.rows.shape[-1])

    @property
    def ndim(self) -> int:
        """Of the factor as a matrix."""
        return self.rows.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self.rows.dtype

    def dense(self) -> Tensor:
        """Rᵀ R."""
        return self.rows.mT @ self.rows


Factor = Tensor | RowsFactor


def gram_of_rows(rows: Tensor) -> Factor:
    """Rᵀ R of rows [k, D] or [G, k, D]: as its rows if they are fewer than D."""
    return RowsFactor(rows) if rows.shape[-2] < rows.shape[-1] else rows.mT @ rows


def dense(factor: Factor) -> Tensor:
    """The factor as a tensor."""
    return factor.dense() if isinstance(factor, RowsFactor) else factor


def scaled(factor: Factor, scale: float) -> Factor:
    """The factor times a number ≥ 0."""
    if isinstance(factor, RowsFactor):
        return RowsFactor(factor.rows * scale**0.5)
    return scale * factor


class FactorSum:
    """A sum of factors, kept as rows as long as they are fewer than the side."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._dense: Tensor | None = None

    def add(self, factor: Factor) -> None:
        """Add a factor; with enough rows the sum becomes a matrix, as does a mixed one."""
        if factor.ndim > 1 and self._dense is not None and self._dense.ndim == 1:
            diagonal, self._dense = self._dense, None
            self.add(factor)
            factor = diagonal
        if factor.ndim == 1 and (self._parts or (self._dense is not None and self._dense.ndim > 1)):
            factor = _diagonal_rows(dense(factor))
        if self._dense is None and isinstance(factor, RowsFactor):
            self._parts.append(factor.rows)
            if sum(part.shape[-2] for part in self._parts) < factor.shape[-1]:
                return
            factor, self._parts = RowsFactor(torch.cat(self._parts, dim=-2)), []
        total = dense(factor)
        if self._parts:
            total, self._parts = total + dense(self.value()), []
        self._dense = total if self._dense is None else self._dense + total

    def value(self) -> Factor:
        """The sum so far; something was added."""
        if self._dense is not None:
            return self._dense
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts, dim=-2)]
        return RowsFactor(self._parts[0])


def _diagonal_rows(diagonal: Tensor) -> Factor:
    """A diagonal factor as its rows, one for every entry that is not zero."""
    index = diagonal.nonzero()[:, 0]
    rows = diagonal.new_zeros(len(index), len(diagonal))
    rows[torch.arange(len(index), device=index.device), index] = diagonal[index].sqrt()
    return gram_of_rows(rows)


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
