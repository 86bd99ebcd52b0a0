"""The rule of a last linear layer under a softmax."""

from __future__ import annotations

from torch import Tensor

from laplace_debiased.curvature.operations import LinearRule, OperationCall
from laplace_debiased.curvature.rows import BlockRows, MatrixRows
from laplace_debiased.curvature.rows.softmax import SoftmaxBiasRows, SoftmaxMatrixRows


class SoftmaxHeadRule(LinearRule):
    """A last linear layer under a softmax, whose one column is q = √(w p)."""

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Rows in closed form."""
        return _in_closed_form(super().rows(call, slot, columns))

    def column_rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Rows in closed form, without what was read."""
        return _in_closed_form(super().column_rows(call, slot, columns))


def _in_closed_form(rows: BlockRows) -> BlockRows:
    if isinstance(rows, MatrixRows):
        return SoftmaxMatrixRows(rows.inputs, rows.columns)
    return SoftmaxBiasRows(rows.columns)
