"""Derivatives of a pure function of parameters, vectorised over samples and over directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.network.inputs import batch_length
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.network.precision import HALF_DTYPES

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


def sample_rows(
    call: Callable[[Parameters, Any], Tensor], parameters: Parameters, inputs: Any, columns: Tensor
) -> Tensor:
    """Rows J_nᵀ s for every sample n and every column s, in one vectorised call.

    Args:
        call: from parameters and a batch of inputs to outputs [m, C].
        parameters: by name; rows are in the order of their entries.
        inputs: model inputs of n samples.
        columns: cotangents [n, C, r].

    Returns:
        Rows [n, r, P].

    Raises:
        RuntimeError: if torch cannot vectorise the function.
    """
    axes = sample_axes(inputs)

    def rows_of_sample(sample: Any, cotangents: Tensor) -> Parameters:
        single = with_batch_axis(sample, axes)
        pull = vjp(lambda p: call(p, single)[0], parameters)[1]
        return vmap(lambda column: pull(column)[0], in_dims=1)(cotangents)

    found = vmap(rows_of_sample, in_dims=(axes, 0))(inputs, columns)
    n, _, width = columns.shape
    return torch.cat([found[name].reshape(n, width, -1) for name in parameters], -1)


def directional_outputs(
    call: Callable[[Parameters], Tensor], parameters: Parameters, tangents: Parameters
) -> Tensor:
    """J_n u [k, n, C] of a batch for every direction u, by forward mode.

    Args:
        call: from parameters to the outputs [n, C] of the batch.
        parameters: by name.
        tangents: the directions, one tensor [k, *shape] per parameter.
    """
    return vmap(lambda tangent: jvp(call, (parameters,), (tangent,))[1])(tangents)


def split_directions(directions: Tensor, parameters: Mapping[str, Tensor]) -> Parameters:
    """Columns of ``directions`` [P, k] as one tensor [k, *shape] per parameter."""
    pieces = directions.T.split([value.numel() for value in parameters.values()], dim=1)
    return {
        name: piece.reshape(-1, *value.shape).to(value)
        for (name, value), piece in zip(parameters.items(), pieces, strict=True)
    }


def sample_axes(inputs: Any) -> Any:
    """Which axis of a model's input runs over samples, for ``torch.vmap``."""
    length = batch_length(inputs)
    return _nested(lambda t: 0 if t.ndim and len(t) == length else None, inputs)


def with_batch_axis(sample: Any, axes: Any) -> Any:
    """One sample's input as a batch of one."""
    if isinstance(sample, dict):
        return {key: with_batch_axis(value, axes[key]) for key, value in sample.items()}
    if isinstance(sample, tuple | list):
        return type(sample)(with_batch_axis(v, a) for v, a in zip(sample, axes, strict=True))
    return sample.unsqueeze(0) if axes == 0 else sample


def plain_inputs(value: Any, half_as: torch.dtype = torch.float32) -> Any:
    """Plain dicts and tensors that derivatives can be taken through: no inference tensors.

    Args:
        value: model inputs.
        half_as: dtype of what comes in half precision.
    """
    if isinstance(value, Mapping):
        return {key: plain_inputs(entry, half_as) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(plain_inputs(entry, half_as) for entry in value)
    if not isinstance(value, Tensor):
        return value
    value = value.clone() if value.is_inference() else value
    return value.to(half_as) if value.dtype in HALF_DTYPES else value


def _nested(function: Callable[[Tensor], Any], inputs: Any) -> Any:
    """``function`` of every tensor in dicts, tuples and lists; None for what is none."""
    if isinstance(inputs, dict):
        return {key: _nested(function, value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_nested(function, value) for value in inputs)
    return function(inputs) if isinstance(inputs, Tensor) else None
