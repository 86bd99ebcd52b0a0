"""Whether derivatives with stand-ins for the parameters are those of the model's own parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.inputs import (
    AttributeDict,
    call_arguments,
    explained_failure,
    logits_of,
)
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.outputs import checked_tensor
from laplace_debiased.network.precision import HALF_DTYPES, full_precision
from laplace_debiased.network.substitution import substituted

_TOLERANCE = 2e-2
"""Relative, norm-wise: round-off stays far below, and what is missing is of order 1."""

_NOISE = 1e-5
"""Of the largest gradient: a bias of keys, say, has no gradient but what round-off leaves."""


def check_gradients_reach(network: FunctionalNetwork, sample: Any) -> None:
    """Check on one sample that no gradient of a covered parameter is lost on its way.

    Stand-ins take a parameter's place in the calls of torch functions. The ``apply`` of a
    ``torch.autograd.Function`` is none: it reads the parameter itself, as a constant.

    Args:
        network: the network and its covered parameters.
        sample: prepared inputs of one sample.

    Raises:
        ModelCallError: naming the parameter.
    """
    named = dict(network.model.named_parameters())
    own = {
        name: named[name]
        for name in network.names
        # A hook changes a gradient: nothing can be compared.
        if named[name].requires_grad and not named[name]._backward_hooks
    }
    # Nor where stand-ins in float32 take the place of what computes in half precision.
    if not own or any(p.dtype in HALF_DTYPES for p in named.values()):
        return
    with differentiable_kernels(network.model), torch.enable_grad(), explained_failure(sample):
        values = {name: value.requires_grad_(True) for name, value in network.parameters().items()}
        outputs = network.call(values, network.constants(), sample)
        again = _own_outputs(network, sample)
        cotangent = torch.linspace(1.0, 2.0, outputs.numel()).to(outputs).reshape(outputs.shape)
        found = _gradients(outputs, [values[name] for name in own], cotangent)
        expected = _gradients(again, list(own.values()), cotangent)
    noise = _NOISE * max(float(gradient.norm()) for gradient in expected)
    for name, one, other in zip(own, found, expected, strict=True):
        if bool((one - other).norm() > _TOLERANCE * other.norm() + noise):
            raise ModelCallError(
                f"derivatives do not reach parameter {name!r} as the model's own backward pass "
                "does: a torch.autograd.Function reads it, which per-sample derivatives take for "
                "a constant. Write that function in torch operations, or freeze the parameter "
                "(requires_grad_(False)), which then stays at its trained value."
            )


def _own_outputs(network: FunctionalNetwork, sample: Any) -> Tensor:
    inputs = AttributeDict(sample) if isinstance(sample, dict) else sample
    args, kwargs = call_arguments(network.model, inputs)
    with substituted({}):
        return full_precision(checked_tensor(logits_of(network.model(*args, **kwargs))))


def _gradients(outputs: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    if not outputs.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(outputs, leaves, cotangent, materialize_grads=True)
    return [gradient.to_dense() if gradient.is_sparse else gradient for gradient in found]
