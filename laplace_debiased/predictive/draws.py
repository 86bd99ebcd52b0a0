r"""Function draws: outputs f + J (w_s − w) of the linearised network at sampled weights w_s.

A draw is one function: evaluated on every sample, in every batch and at every output it belongs to
the same weights. It takes one pass in forward mode, whatever the number of outputs, and its mirror
image f − J (w_s − w), which is as likely, comes for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import batch_length, explained_failure, row_slices, select_rows
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.outputs import check_outputs
from laplace_debiased.network.transforms import Parameters, jvp
from laplace_debiased.options import DEFAULT_BYTE_BUDGET
from laplace_debiased.predictive.selection import (
    OutputSelection,
    at_positions,
    last_positions,
)

_LIVE = 8
"""Forward mode holds about so many arrays of the size of the largest activation at a time, values
and tangents together."""


@dataclass(frozen=True, eq=False)
class NetworkProducts:
    """Of all weights: forward mode, or twice backward where an operation has no forward mode.

    Args:
        network: the network and its covered parameters.
        byte_budget: working memory of one chunk, in bytes.
    """

    network: FunctionalNetwork
    byte_budget: int = DEFAULT_BYTE_BUDGET
    _backward: dict[str, bool] = field(default_factory=dict, repr=False)

    def along(
        self,
        inputs: Any,
        directions: Iterable[Tensor],
        *,
        last_position: bool = False,
        differentiable: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs f [m, C], and J w [m, C] for every direction w [P] ([m, T, C] of sequences).

        Args:
            inputs: one batch of model inputs, m samples.
            directions: read one by one.
            last_position: of a sequence only its last position, [m, C].
            differentiable: keep the graph, for gradients with respect to ``inputs``.
        """
        network, inputs = self.network, self.network.prepare(inputs)
        parameters = network.parameters()
        sizes = [value.numel() for value in parameters.values()]
        outputs, found = [], []
        with differentiable_kernels(network.model), torch.set_grad_enabled(differentiable):
            chunks = self._chunks(inputs)
            functions = [self._function(part, last_position) for part in chunks]
            for part, function in zip(chunks, functions, strict=True):
                with explained_failure(part):
                    outputs.append(function(parameters))
                check_outputs(outputs[-1], batch_length(part), positions=True)
            for w in directions:
                tangent = {
                    name: piece.reshape(value.shape).to(value)
                    for (name, value), piece in zip(parameters.items(), w.split(sizes), strict=True)
                }
                products = [
                    self._product(function, parameters, tangent, differentiable)
                    for function in functions
                ]
                found.append(torch.cat(products))
        return torch.cat(outputs), found

    def _chunks(self, inputs: Any) -> list[Any]:
        m = batch_length(inputs)
        with explained_failure(inputs):
            _, largest = self.network.saved_entries(select_rows(inputs, slice(0, 1)))
        size = torch.finfo(self.network.dtype).bits // 8
        step = max(1, min(m, self.byte_budget // max(1, _LIVE * largest * size)))
        if step == m:
            return [inputs]
        return [select_rows(inputs, rows) for rows in row_slices(m, step)]

    def _function(self, inputs: Any, last_position: bool) -> Callable[[Parameters], Tensor]:
        call = self.network.function_of(inputs)

        def function(parameters: Parameters) -> Tensor:
            outputs = call(parameters)
            if not last_position:
                return outputs
            if outputs.ndim < 3:
                OutputSelection(last_position=True).require_no_positions()
            last = last_positions(inputs, outputs.shape[1])
            return at_positions(outputs, last, slice(None))

        return function

    def _product(
        self,
        function: Callable[[Parameters], Tensor],
        parameters: Parameters,
        tangent: Parameters,
        differentiable: bool,
    ) -> Tensor:
        if not self._backward:
            try:
                return jvp(function, (parameters,), (tangent,))[1]
            except (RuntimeError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
        # Not every operation has a forward mode. If it was something else, it will show again,
        # with its own message.
        found = twice_backward(function, parameters, tangent, differentiable)
        self._backward["always"] = True
        return found


def twice_backward(
    function: Callable[[Parameters], Tensor],
    parameters: Parameters,
    tangent: Parameters,
    differentiable: bool = False,
) -> Tensor:
    """J w from two backward passes: Jᵀv is linear in v, and its derivative along w is J w."""
    leaves = {
        name: value.detach().clone().requires_grad_(True) for name, value in parameters.items()
    }
    with torch.enable_grad():
        outputs = function(leaves)
        v = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, list(leaves.values()), v, create_graph=True, materialize_grads=True
        )
        (found,) = torch.autograd.grad(
            pulled, v, list(tangent.values()), create_graph=differentiable
        )
    return found


@dataclass(frozen=True, eq=False)
class HeadProducts:
    """Of a last layer's weights: its outputs are linear in them.

    Args:
        feature_pass: gives features, and says which parameters are covered.
        names: covered parameters, in the order of a direction.
    """

    feature_pass: FeaturePass
    names: tuple[str, ...]

    def along(
        self,
        inputs: Any,
        directions: Iterable[Tensor],
        *,
        last_position: bool = False,
        differentiable: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`NetworkProducts`."""
        OutputSelection(last_position=last_position).require_no_positions()
        outputs, features = self.feature_pass.features(inputs, differentiable=differentiable)
        with outside_inference_mode(), torch.set_grad_enabled(differentiable):
            if not differentiable:
                outputs, features = outputs.detach(), features.detach()
            return outputs, [self._product(features, direction) for direction in directions]

    def _product(self, features: Tensor, direction: Tensor) -> Tensor:
        head = self.feature_pass.head
        n_outputs = self.feature_pass.n_outputs
        sizes = {head.weight: n_outputs * features.shape[1], head.bias: n_outputs}
        parts = dict(
            zip(self.names, direction.split([sizes[name] for name in self.names]), strict=True)
        )
        found = features.new_zeros(len(features), n_outputs)
        if head.weight is not None:
            found = found + features @ parts[head.weight].reshape(n_outputs, -1).T
        return found if head.bias is None else found + parts[head.bias]
