"""Outputs of a network at sampled weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import call_arguments, explained_failure, logits_of, to_device
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.substitution import call_with


def network_samples(
    model: nn.Module,
    parameters: list[tuple[str, Tensor]],
    weight_samples: Tensor,
    inputs: Any,
    *,
    differentiable: bool,
    **model_kwargs: Any,
) -> Iterator[Tensor]:
    """Outputs of the network at each weight sample; its own weights are never written.

    Args:
        model: the network.
        parameters: name and current value of every covered parameter, in order.
        weight_samples: [S, P] samples of these, flattened and concatenated.
        inputs: one batch of model inputs.
        differentiable: keep the graph with respect to ``inputs``.
        model_kwargs: further arguments of the model.
    """
    device = parameters[0][1].device
    inputs = to_device(inputs, device)
    sizes = [value.numel() for _, value in parameters]
    for sample in weight_samples:
        values = {
            name: part.reshape(value.shape).to(value.dtype)
            for (name, value), part in zip(parameters, sample.split(sizes), strict=True)
        }
        with (
            outside_inference_mode(),
            torch.set_grad_enabled(differentiable),
            evaluation_mode(model),
            explained_failure(inputs),
        ):
            args, named = call_arguments(model, inputs)
            outputs = logits_of(call_with(model, values, args, {**named, **model_kwargs}))
        yield outputs
