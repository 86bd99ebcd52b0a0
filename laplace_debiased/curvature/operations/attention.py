r"""Projections of ``multi_head_attention_forward``, one call that reads all of its parameters.

``in_proj_weight`` [3E, E] stacks the projections of queries, keys and values: three maps with
their own Kronecker factors each. They are taken out: projected by themselves, where inputs and
outputs can be recorded, with torch's function run on identities in their place. Masks, scores and
averages stay torch's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from laplace_debiased.curvature.operations.call import (
    OperationCall,
    Reading,
    RuleDefaults,
)
from laplace_debiased.curvature.operations.linear import LinearRule
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import Factor, input_factor, stacked
from laplace_debiased.curvature.rows.parameters import BiasRows, MatrixRows

_SIGNATURE = inspect.signature(functional.multi_head_attention_forward)
_LINEAR = LinearRule()
_NAME = "multi_head_attention_forward"


class Recording(Protocol):
    """What a function that is taken apart asks of the recorder."""

    def is_covered(self, argument: Any) -> bool:
        """Whether an argument belongs to a covered parameter."""

    def refuse(self, operation: str, why: str, arguments: Iterable[Any]) -> None:
        """Note why the parameters that arguments are made of cannot be covered."""

    def note(
        self, operation: str, rule: RuleDefaults, reading: Reading, outputs: tuple[Tensor, ...]
    ) -> None:
        """Record a call that has been made apart."""


class InputProjectionsRule(RuleDefaults):
    """The packed input projection, as three maps [E, E]."""

    def readings(self, *args: Any, **kwargs: Any) -> tuple[Reading, ...]:
        return ()

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Inputs of the three projections [m, T_i, E], columns [m, R, T_i, E]."""
        flat = [_positions(c, 2) for c in columns]
        longest = max(c.shape[2] for c in flat)
        g = [_padded(c, longest) for c in flat]
        if slot == "bias":
            return BiasRows(torch.cat(g, -1))

        def read() -> Tensor:
            return torch.stack([_padded(_positions(a, 1), longest) for a in call.inputs])

        return MatrixRows(read, torch.stack(g))

    def input_factor(
        self, call: OperationCall, slot: str, counts: Tensor | None = None
    ) -> Factor | None:
        """[3, E, E], each over its own positions."""
        if slot == "bias":
            return None
        return stacked([input_factor(_positions(a, 1), counts) for a in call.inputs])


def _positions(tensor: Tensor, lead: int) -> Tensor:
    """[*lead, ..., E] as [*lead, T, E]."""
    return tensor.reshape(*tensor.shape[:lead], -1, tensor.shape[-1])


def _padded(positions: Tensor, length: int) -> Tensor:
    """[..., T, E] filled up with zeros to [..., length, E]."""
    return functional.pad(positions, (0, 0, 0, length - positions.shape[-2]))


_PROJECTIONS = InputProjectionsRule()
_INPUTS = ("query", "key", "value")
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def attend_apart(
    recording: Recording, func: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """Run ``multi_head_attention_forward`` with its projections made and recorded apart.

    Returns:
        What the function returns; NotImplemented where it is to be run as it is.
    """
    call = dict(_SIGNATURE.bind(*args, **kwargs).arguments)
    names = ("in_proj_weight", "in_proj_bias", *_SEPARATE, "out_proj_weight", "out_proj_bias")
    if call["query"].ndim != 3 or not any(recording.is_covered(call.get(n)) for n in names):
        return NotImplemented
    others = [call.get(key) for key in (*_INPUTS, "bias_k", "bias_v")]
    recording.refuse(_NAME, "has no rule for queries, keys and values of their own", others)
    _project_inputs(recording, call)
    return _project_outputs(recording, func, call)


def _project_inputs(recording: Recording, call: dict[str, Any]) -> None:
    """Leave projections in the place of queries, keys and values, and identities of weights."""
    separate = call.get("use_separate_proj_weight", False)
    inputs = tuple(call[key].transpose(0, 1) for key in _INPUTS)
    weight, bias = call["in_proj_weight"], call["in_proj_bias"]
    weights = [call[name] for name in _SEPARATE] if separate else weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    outputs = tuple(map(functional.linear, inputs, weights, biases))
    if separate:
        for a, w, b, output in zip(inputs, weights, biases, outputs, strict=True):
            recording.note(_NAME, _LINEAR, Reading({"weight": w, "bias": b}, (a,)), (output,))
    else:
        reading = Reading({"weight": weight, "bias": bias}, inputs, whole=True)
        recording.note(_NAME, _PROJECTIONS, reading, outputs)
    for key, output in zip(_INPUTS, outputs, strict=True):
        call[key] = output.transpose(0, 1)
    call |= dict.fromkeys(_SEPARATE, _identity_like(outputs[0]))
    call |= {"use_separate_proj_weight": True, "in_proj_weight": None, "in_proj_bias": None}


def _project_outputs(recording: Recording, func: Callable, call: dict[str, Any]) -> Any:
    weight, bias = call["out_proj_weight"], call["out_proj_bias"]
    call |= {"out_proj_weight": _identity_like(weight), "out_proj_bias": None}
    attended, scores = func(**call)
    inputs = attended.transpose(0, 1)
    outputs = functional.linear(inputs, weight, bias)
    reading = Reading({"weight": weight, "bias": bias}, (inputs,))
    recording.note(_NAME, _LINEAR, reading, (outputs,))
    return outputs.transpose(0, 1), scores


def _identity_like(tensor: Tensor) -> Tensor:
    size = tensor.shape[-1]
    return torch.eye(size, dtype=tensor.dtype, device=tensor.device)
