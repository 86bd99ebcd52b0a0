"""Tensors of a forward pass that no sample has touched, and what torch's functions make of them."""

# ruff: noqa: SIM905  (a list of names reads better in lines than in a column)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPREADING = frozenset("expand expand_as broadcast_to repeat tile repeat_interleave".split())
CONSTANT_FACTORIES = frozenset("zeros ones full zeros_like ones_like full_like".split())
CASTS = frozenset("to float half bfloat16 double type type_as contiguous cuda cpu".split())
LIKE = frozenset("type_as to expand_as view_as reshape_as new_zeros new_ones new_full".split())
"""Operations that read no more of their further arguments than shape, dtype and device."""


@dataclass(frozen=True, eq=False)
class Untouched:
    """A tensor that no sample has touched.

    Attributes:
        tensor: the tensor; held, so that its ``id`` stays its own.
        calls: shared calls that it depends on, by their place on the tape.
        made_of: covered parameters that it is, or is made of by functions other than such calls.
        names: covered parameters that it depends on.
        stored: the same tensor as a view of its one parameter's memory; None if it is none.
        spread: whether it was repeated over the batch, so that its first dimension is the batch.
        through: the first operation that made it more than a view of a parameter.
    """

    tensor: Tensor
    calls: frozenset[int] = frozenset()
    made_of: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    stored: Tensor | None = None
    spread: bool = False
    through: str | None = None


class _Identity(torch.autograd.Function):
    """The same memory as a tensor that is no view of another one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def of_its_own(output: Tensor) -> Tensor:
    """An output that can be recorded, whatever follows.

    A linear map of many positions returns a view. An activation in place on a view writes a new
    history for what is viewed, in which the edge that was recorded is no longer found.
    """
    return _Identity.apply(output) if output._is_view() and output.requires_grad else output


def writes(func: Callable) -> bool:
    """Whether a function writes to its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def stored_view(name: str, source: Untouched, output: Tensor) -> Tensor | None:
    """An output as a view of its parameter's memory; None if it is none."""
    if source.stored is None:
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(output):
        return None
    if output.untyped_storage().data_ptr() == source.tensor.untyped_storage().data_ptr():
        return output if source.stored is source.tensor else None
    same = output.shape == source.tensor.shape and output.is_floating_point()
    return source.stored if name in CASTS and same else None


def is_spread(name: str, output: Tensor, found: list[Untouched], m: int) -> bool:
    """Whether an output's first dimension is the batch of m, though no sample was read."""
    if output.ndim == 0 or len(output) % m:
        return False
    if name in CONSTANT_FACTORIES:
        return len(output) == m
    if name in SPREADING and found:
        before = found[0].tensor
        lead = len(before) if before.ndim == output.ndim else 1
        return lead * m == len(output) or found[0].spread
    return any(v.spread and v.tensor.ndim and len(v.tensor) == len(output) for v in found)
