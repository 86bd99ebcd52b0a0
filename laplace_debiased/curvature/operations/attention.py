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
    OperationRule,
    Reading,
    RuleDefaults,
)
from laplace_debiased.curvature.operations.linear import LinearRule
from laplace_debiased.curvature.rows import (
    BiasRows,
    BlockRows,
    Factor,
    GroupedRows,
    input_factor,
    stacked,
)

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
        self, operation: str, rule: OperationRule, reading: Reading, outputs: tuple[Tensor, ...]
    ) -> None:
        """Record a call that has been made apart."""


class InputProjectionsRule(RuleDefaults):
    """The packed input projection, as three maps [E, E]."""

    def readings(self, *args: Any, **kwargs: Any) -> tuple[Reading, ...]:
        """None: this rule is for calls that are made apart."""
        return ()

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> Tensor | None:
        """As it is."""
        return argument if slot == "weight" else None

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Inputs of the three projections [m, T_i, E], columns [m, R, T_i, E]."""
        if slot == "bias":
            return self.column_rows(call, slot, columns)
        longest = max(_positions(c, 2).shape[2] for c in columns)
        a = torch.stack([_padded(_positions(inputs, 1), longest) for inputs in call.inputs])
        return GroupedRows(a, torch.stack([_padded(_positions(c, 2), longest) for c in columns]))

    def column_rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Rows without what was read."""
        flat = [_positions(c, 2) for c in columns]
        longest = max(c.shape[2] for c in flat)
        padded = [_padded(c, longest) for c in flat]
        return (
            BiasRows(torch.cat(padded, -1))
            if slot == "bias"
            else GroupedRows(None, torch.stack(padded))
        )

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
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def attend_apart(
    recording: Recording, func: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """Run ``multi_head_attention_forward`` with its projections made and recorded apart.

    Args:
        recording: the recorder.
        func: torch's function.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        What the function returns; NotImplemented where it is to be run as it is.
    """
    call = dict(_SIGNATURE.bind(*args, **kwargs).arguments)
    names = ("in_proj_weight", "in_proj_bias", *_SEPARATE, "out_proj_weight", "out_proj_bias")
    if call["query"].ndim != 3 or not any(recording.is_covered(call.get(n)) for n in names):
        return NotImplemented
    others = [call.get(key) for key in ("query", "key", "value", "bias_k", "bias_v")]
    recording.refuse(_NAME, "has no rule for queries, keys and values of their own", others)
    if call.get("use_separate_proj_weight", False):
        _project_separately(recording, call)
    else:
        _project_together(recording, call)
    return _project_outputs(recording, func, call)


def _inputs(call: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return tuple(call[key].transpose(0, 1) for key in ("query", "key", "value"))


def _biases(call: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
    bias = call["in_proj_bias"]
    return (None,) * 3 if bias is None else tuple(bias.chunk(3))


def _project_together(recording: Recording, call: dict[str, Any]) -> None:
    weights, inputs = call["in_proj_weight"].chunk(3), _inputs(call)
    outputs = tuple(
        functional.linear(a, weight, bias)
        for a, weight, bias in zip(inputs, weights, _biases(call), strict=True)
    )
    parameters = {"weight": call["in_proj_weight"], "bias": call["in_proj_bias"]}
    reading = Reading(parameters, inputs, whole=True)
    recording.note(_NAME, _PROJECTIONS, reading, outputs)
    _replace_inputs(call, outputs)


def _project_separately(recording: Recording, call: dict[str, Any]) -> None:
    found = []
    for name, a, bias in zip(_SEPARATE, _inputs(call), _biases(call), strict=True):
        found.append(functional.linear(a, call[name], bias))
        reading = Reading({"weight": call[name], "bias": bias}, (a,))
        recording.note(_NAME, _LINEAR, reading, (found[-1],))
    _replace_inputs(call, tuple(found))


def _replace_inputs(call: dict[str, Any], projected: tuple[Tensor, ...]) -> None:
    for key, value in zip(("query", "key", "value"), projected, strict=True):
        call[key] = value.transpose(0, 1)
    call |= dict.fromkeys(_SEPARATE, _identity_like(projected[0]))
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
