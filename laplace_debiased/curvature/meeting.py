"""Where something that all samples share meets them: a copy for each, noted on the tape."""

# ruff: noqa: SIM905  (a list of names reads better in lines than in a column)
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from laplace_debiased.curvature.tape import Meeting, Tape
from laplace_debiased.curvature.untouched import Untouched
from laplace_debiased.network.inputs import tensors_of

BROADCASTING = frozenset(
    """add sub rsub mul div true_divide where maximum minimum fmax fmin pow addcmul addcdiv lerp
    atan2 hypot logaddexp masked_fill scaled_dot_product_attention""".split()
)
"""Operations whose tensor arguments are broadcast against each other; without underscores."""


def broadcast_shape(
    name: str, args: tuple, kwargs: Mapping[str, Any]
) -> Callable[[Tensor], torch.Size] | None:
    """The shape that an operation broadcasts each of its arguments to; None if it does not."""
    tensors = list(tensors_of([args, dict(kwargs)]))
    if name == "scaled_dot_product_attention":
        query = tensors[0].shape
        return lambda tensor: query
    if name in ("matmul", "rmatmul") and all(tensor.ndim > 2 for tensor in tensors):
        lead = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in tensors))
        return lambda tensor: torch.Size((*lead, *tensor.shape[-2:]))
    plain = name if name in BROADCASTING or name[:1] not in ("i", "r") else name[1:]
    if plain not in BROADCASTING:
        return None
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    return lambda tensor: shape


def met_copies(tape: Tape, value: Untouched, shape: torch.Size) -> Tensor | None:
    """A copy for every sample, broadcast as the tensor itself would be; None if unclear."""
    tensor, m = value.tensor, tape.length
    if not shape or shape[0] % m or tensor.ndim > len(shape):
        return None
    k = shape[0] // m
    if tensor.ndim == len(shape) and len(tensor) > 1:
        if value.spread:
            return met_spread(tape, value)
        if m > 1:
            return None
        copies = tensor.view_as(tensor)
        _note(tape, copies, tensor, value)
        return copies
    base = tensor.reshape((1,) * (len(shape) - tensor.ndim) + tensor.shape)
    copies = base.expand(m, *base.shape[1:])
    copies = copies if m > 1 else base.view_as(base)
    _note(tape, copies, tensor, value)
    return copies if k == 1 else copies.repeat_interleave(k, 0)


def met_spread(tape: Tape, value: Untouched) -> Tensor:
    """What was repeated over the batch: all copies are equal, and depend on one of them."""
    tensor = value.tensor
    copies = tensor.view_as(tensor)
    _note(tape, copies, tensor[: len(tensor) // tape.length], value)
    return copies


def _note(tape: Tape, copies: Tensor, base: Tensor, value: Untouched) -> None:
    if not copies.requires_grad:  # under no_grad
        return
    itself = [tape.parameter_itself(name) for name in sorted(value.made_of)]
    calls = tuple(sorted((*value.calls, *itself)))
    tape.meetings.append(Meeting(get_gradient_edge(copies), base, calls))
