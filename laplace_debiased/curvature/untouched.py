"""Tensors of a forward pass that no sample has touched: what they become, and where they meet."""

# ruff: noqa: SIM905  (a list of names reads better in lines than in a column)
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from laplace_debiased.curvature.tape import Meeting, Tape
from laplace_debiased.network.inputs import tensors_of

SPREADING = frozenset("expand expand_as broadcast_to repeat tile repeat_interleave".split())
CONSTANT_FACTORIES = frozenset("zeros ones full zeros_like ones_like full_like".split())
CASTS = frozenset("to float half bfloat16 double type type_as contiguous cuda cpu".split())
LIKE = frozenset("type_as to expand_as view_as reshape_as new_zeros new_ones new_full".split())
"""Operations that read no more of their further arguments than shape, dtype and device."""


BROADCASTING = frozenset(
    """add sub rsub mul div true_divide where maximum minimum fmax fmin pow addcmul addcdiv lerp
    atan2 hypot logaddexp masked_fill scaled_dot_product_attention""".split()
)
"""Operations whose tensor arguments are broadcast against each other; without underscores."""


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
    if tensor.ndim == len(shape) and len(tensor) > 1:
        return met_spread(tape, value) if value.spread or m == 1 else None
    base = tensor.reshape((1,) * (len(shape) - tensor.ndim) + tensor.shape)
    copies = base.expand(m, *base.shape[1:]) if m > 1 else base.view_as(base)
    _note(tape, copies, base, value)
    k = shape[0] // m
    if k == 1:
        return copies
    if tape.copies == 1 or k % tape.copies:
        return copies.repeat_interleave(k, 0)
    return copies.repeat_interleave(k // tape.copies, 0).repeat(tape.copies, *[1] * (base.ndim - 1))


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


JOINS = frozenset({torch.cat, torch.concat, torch.concatenate})
FLATTENS = frozenset({torch.reshape, torch.flatten, Tensor.reshape, Tensor.flatten})

Rows = frozenset[tuple[int, int]]
"""Where tensors of a network's input begin in memory, and how far their samples are apart."""


def rows_of(inputs: Any, m: int) -> Rows:
    """Of all inputs with m samples in front."""
    return frozenset(_row(tensor) for tensor in tensors_of(inputs) if _has(tensor, m))


def note_copies(
    tape: Tape, rows: Rows, tensors: Any, dim: int = 0, *, axis: int | None = None, out: Any = None
) -> None:
    """Note where parts of all samples are put behind each other, as chosen and rejected texts.

    What the network computes from there on has one part of all samples after the other in front.
    That is certain of views into the inputs that step from sample to sample as these do; of other
    tensors a length of m may be chance.
    """
    m, parts = tape.length, list(tensors)
    along = dim if axis is None else axis
    if m == 1 or len(parts) < 2 or along not in (0, -parts[0].ndim):
        return
    if all(_has(part, m) and _row(part) in rows for part in parts):
        tape.copies = len(parts)


def note_flattened(tape: Tape, rows: Rows, tensor: Tensor, outputs: Tensor) -> None:
    """Note the same of transposed inputs [k, m, ...] that become [k·m, ...].

    What has the samples in front, and is flattened, has each sample's parts together again.
    """
    m, shape = tape.length, tensor.shape
    if m == 1 or len(shape) < 2 or outputs.shape[:1] in ((), (m,), shape[:1]):
        return
    if shape[1] == m and _row(tensor.select(0, 0)) in rows:
        tape.copies = shape[0]
    elif shape[0] == m:
        tape.unclear |= tape.copies == m  # parts may be in front, as they were
        tape.copies = 1


def _has(tensor: Tensor, m: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == m


def _row(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor.stride(0)
