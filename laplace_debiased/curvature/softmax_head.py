"""The rule of a last linear layer under a softmax."""

from __future__ import annotations

from torch import nn

from laplace_debiased.curvature.layers import LayerCall, LinearMapRule
from laplace_debiased.curvature.rows import LayerRows, MatrixRows
from laplace_debiased.curvature.rows.softmax import SoftmaxBiasRows, SoftmaxMatrixRows


class SoftmaxHeadRule(LinearMapRule):
    """A last linear layer under a softmax, whose one column is q = √(w p)."""

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Rows in closed form."""
        general = super().rows(module, call)
        weight, bias = general.weight, general.bias
        return LayerRows(
            SoftmaxMatrixRows(weight.inputs, weight.columns)
            if isinstance(weight, MatrixRows)
            else None,
            None if bias is None else SoftmaxBiasRows(bias.columns),
        )
