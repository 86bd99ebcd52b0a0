"""Gradients of small parameters that go through operations without a rule, sample by sample."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from laplace_debiased.curvature.operations.call import Cotangents, OperationCall, plain_call
from laplace_debiased.curvature.tape import Tape
from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.modes import differentiable_kernels


@dataclass(frozen=True, eq=False)
class GeneralRows:
    """Per-sample gradients by ``torch.func`` over the batch, written out: a call per parameter."""

    network: FunctionalNetwork
    calls: tuple[OperationCall, ...]
    inputs: Any

    @classmethod
    def of(cls, model: nn.Module, tape: Tape, names: Collection[str], inputs: Any) -> GeneralRows:
        """Of the named parameters.

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
        calls = tuple(plain_call(name, tape.parameters[name]) for name in names)
        return cls(FunctionalNetwork(model, tuple(names)), calls, inputs)

    def pull_back(self, column: Tensor) -> list[Cotangents]:
        """Gradients [m, P] of one column [m, C] at every parameter.

        Raises:
            RuntimeError: if torch cannot vectorise the network.
        """
        if not self.calls:
            return []
        network = self.network
        with differentiable_kernels(network.model):
            column = column.to(network.dtype).unsqueeze(-1)
            rows = network.rows(network.prepare(self.inputs), column)[:, 0]
        return [(part,) for part in rows.split(network.sizes, dim=1)]
