"""Derivatives of a pure function of parameters, vectorised over samples and over directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.network.inputs import batch_length, map_tensors, tensors_of
from laplace_debiased.network.interrupts import uninterrupted

Parameters = dict[str, Tensor]


def vmap(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """``torch.vmap``, whose calls run to their end: an interrupt is let through after them.

    The transformations of ``torch.func`` keep levels and flags for the whole process, and an
    interrupt between two of them leaves some behind: no derivative can be taken any more.
    """
    mapped = torch.vmap(function, *args, **kwargs)

    def call(*inputs: Any) -> Any:
        with uninterrupted():
            return mapped(*inputs)

    return call


def jvp(function: Callable[..., Any], primals: Any, tangents: Any) -> Any:
    """``torch.func.jvp``, run to its end as ``vmap`` is."""
    with uninterrupted():
        return torch.func.jvp(function, primals, tangents)


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """``torch.func.vjp``, run to its end as ``vmap`` is."""
    with uninterrupted():
        outputs, pull = torch.func.vjp(function, *primals)  # type: ignore[misc]
    return outputs, pull


def over_samples(function: Callable[..., Any], inputs: Any, *others: Tensor) -> Any:
    """``function`` of every sample of a model's input, as a batch of one, in one vectorised call.

    It takes the inputs of one sample, and its entries of ``others`` [n, ...].

    Raises:
        RuntimeError: if torch cannot vectorise the function.
    """
    length = batch_length(inputs)

    def is_batched(tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == length

    def of_one(batched: list[Tensor], *entries: Tensor) -> Any:
        own = iter(batched)
        sample = map_tensors(lambda t: next(own) if is_batched(t) else t, inputs)
        return function(sample, *entries)

    batched = [tensor.unsqueeze(1) for tensor in tensors_of(inputs) if is_batched(tensor)]
    return vmap(of_one)(batched, *others)


def directional_outputs(
    call: Callable[[Parameters], Tensor], parameters: Parameters, tangents: Parameters
) -> Tensor:
    """J_n u [k, n, C] of a batch for every direction u, by forward mode.

    ``call`` goes from parameters by name to the outputs [n, C]; ``tangents`` are [k, *shape] each.
    """
    return vmap(lambda tangent: jvp(call, (parameters,), (tangent,))[1])(tangents)
