"""Gradients of small parameters that go through operations without a rule, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from laplace_debiased.curvature.operations.call import Cotangents, OperationCall, plain_call
from laplace_debiased.curvature.tape import Tape
from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.modes import differentiable_kernels

GeneralRows = tuple[tuple[OperationCall, ...], Callable[[Tensor], list[Cotangents]]]
"""A call per parameter, and gradients [m, P] of one column [m, C] at each of them."""


def general_rows(model: nn.Module, tape: Tape, names: Collection[str], inputs: Any) -> GeneralRows:
    """Per-sample gradients of the named parameters, by ``torch.func`` over the batch, written out.

    They raise RuntimeError if torch cannot vectorise the network.

    Raises:
        ModelCallError: if the tape could not record another one: the model does something else
            with it than when it was looked at.
    """
    for name, why in tape.refused.items():
        if name not in names:
            raise ModelCallError(
                f"parameter {name!r} carries a posterior, but on these inputs it goes through "
                f"{why}. Fit again on data on which the model does what it does here."
            )
    network = FunctionalNetwork(model, tuple(names))

    def pull_back(column: Tensor) -> list[Cotangents]:
        if not names:
            return []
        with differentiable_kernels(model):
            column = column.to(network.dtype).unsqueeze(-1)
            rows = network.rows(network.prepare(inputs), column)[:, 0]
        return [(part,) for part in rows.split(network.sizes, dim=1)]

    return tuple(plain_call(name, tape.parameters[name]) for name in names), pull_back
