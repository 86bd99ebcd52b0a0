r"""Scales and shifts of normalisations.

A norm's output is x̂ ⊙ w + b, with x̂ the normalised input. The gradients Σ_t g ⊙ x̂ in w and
Σ_t g in b are small, so that their blocks are exact (see ``VectorRows``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from laplace_debiased.curvature.operations.call import OperationCall, Reading, RuleDefaults
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.parameters import VectorRows


@dataclass(frozen=True, eq=False)
class Normalisation:
    """What a norm does before it scales.

    Attributes:
        normalised: x̂ of its input.
        channels: whether scales are per channel, at dimension 1, and not per entry of the last
            dimensions.
        size: number of scales.
    """

    normalised: Callable[[Tensor], Tensor]
    channels: bool
    size: int


class NormRule(RuleDefaults):
    """Rows of x̂ ⊙ w + b: columns times x̂ for the scale, as they are for the shift.

    Args:
        readings: how a call is read, with the arguments of torch's function.
    """

    def __init__(self, readings: Callable[..., tuple[Reading, ...]]) -> None:
        self.readings = readings

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> None:
        """Scales and shifts are vectors."""

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Inputs [m, ...], columns [m, R, ...] of the same shape."""
        norm: Normalisation = call.settings
        (inputs,), values = call.inputs, columns[0]
        flat = call.flat(inputs)
        if norm.channels and (flat.ndim < 2 or flat.shape[1] != norm.size):
            raise ValueError(f"{call.operation} got an input without a batch dimension.")
        if slot == "weight":
            values = values * norm.normalised(flat).reshape(inputs.shape).unsqueeze(1)
        m, n_columns = values.shape[:2]
        if not norm.channels:
            return VectorRows(values.reshape(m, n_columns, -1, norm.size).sum(2))
        if call.folded:
            values = values.movedim(2, 3)
        return VectorRows(values.flatten(3).sum(3) if values.ndim > 3 else values)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Reading, ...]:
    shape = tuple(normalized_shape)
    run = partial(functional.layer_norm, normalized_shape=shape, eps=eps)
    return _reading(input, weight, bias, run, channels=False)


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> tuple[Reading, ...]:
    shape = tuple(normalized_shape)
    run = partial(functional.rms_norm, normalized_shape=shape, eps=eps)
    return _reading(input, weight, None, run, channels=False)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Reading, ...]:
    run = partial(functional.group_norm, num_groups=num_groups, eps=eps)
    return _reading(input, weight, bias, run)


def _standardised(inputs: Tensor, mean: Any, variance: Any, eps: float) -> Tensor:
    shape = (1, -1, *(1,) * (inputs.ndim - 2))
    scale = (variance.to(inputs) + eps).rsqrt()
    return (inputs - mean.to(inputs).reshape(shape)) * scale.reshape(shape)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Reading, ...]:
    if training or running_mean is None or running_var is None:
        refused = "a batch norm without running statistics mixes the samples"
        return _reading(input, weight, bias, None, refused=refused)
    run = partial(_standardised, mean=running_mean, variance=running_var, eps=eps)
    return _reading(input, weight, bias, run)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Reading, ...]:
    run: Any = partial(functional.instance_norm, eps=eps)
    if not use_input_stats:
        run = partial(_standardised, mean=running_mean, variance=running_var, eps=eps)
    return _reading(input, weight, bias, run)


def _reading(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Any,
    *,
    channels: bool = True,
    refused: str | None = None,
) -> tuple[Reading, ...]:
    scale = weight if weight is not None else bias
    if scale is None:
        return ()
    settings = Normalisation(normalised, channels, scale.numel())
    return (Reading({"weight": weight, "bias": bias}, (input,), settings, refused),)


RULES: dict[Any, NormRule] = {
    functional.layer_norm: NormRule(_layer_norm),
    functional.rms_norm: NormRule(_rms_norm),
    functional.group_norm: NormRule(_group_norm),
    functional.batch_norm: NormRule(_batch_norm),
    functional.instance_norm: NormRule(_instance_norm),
}
