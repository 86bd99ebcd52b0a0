"""Parameters whose gradient is known as a tensor of their own shape, sample by sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from laplace_debiased.curvature.operations.call import OperationCall, Reading, RuleDefaults, Use
from laplace_debiased.curvature.operations.views import Place
from laplace_debiased.curvature.rows import BlockRows, VectorRows


class PlainRule(RuleDefaults):
    """What is "read" is the parameter itself, and the columns are its gradients.

    So for a parameter that is added, multiplied or otherwise broadcast over the batch: each sample
    is given a copy of its own, and the gradient in that copy is the sample's.
    """

    def readings(self, *args: Any, **kwargs: Any) -> tuple[Reading, ...]:
        """None: no function is this rule's."""
        return ()

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> None:
        """All entries are one vector."""

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Columns [m, R, *shape of the parameter]."""
        return VectorRows(columns[0].reshape(*columns[0].shape[:2], -1))


def plain_call(name: str, parameter: Tensor) -> OperationCall:
    """The call that "reads" a parameter as it is, whatever becomes of it.

    Args:
        name: its qualified name.
        parameter: its tensor.
    """
    whole = Place((parameter.numel(),), (0,), (parameter.numel(),))
    return OperationCall("the parameter itself", PlainRule(), {"weight": Use(name, whole)}, ())
