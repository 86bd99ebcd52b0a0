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
from laplace_debiased.curvature.rows import BlockRows, VectorRows


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
    """Rows of x̂ ⊙ w + b: columns times x̂ for the scale, as they are for the shift."""

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> None:
        """Scales and shifts are vectors."""

    def readings(self, *args: Any, **kwargs: Any) -> tuple[Reading, ...]:
        """Given by a subclass."""
        raise NotImplementedError

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Inputs [m, ...], columns [m, R, ...] of the same shape."""
        norm: Normalisation = call.settings
        (inputs,), values = call.inputs, columns[0]
        flat = call.flat(inputs, 1)
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


class LayerNormRule(NormRule):
    """``layer_norm``."""

    def readings(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> tuple[Reading, ...]:
        """As torch's function takes them."""
        shape = tuple(normalized_shape)
        run = partial(functional.layer_norm, normalized_shape=shape, eps=eps)
        return _reading(input, weight, bias, run, channels=False)


class RmsNormRule(NormRule):
    """``rms_norm``."""

    def readings(
        self,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> tuple[Reading, ...]:
        """As torch's function takes them."""
        shape = tuple(normalized_shape)
        run = partial(functional.rms_norm, normalized_shape=shape, eps=eps)
        return _reading(input, weight, None, run, channels=False)


class GroupNormRule(NormRule):
    """``group_norm``."""

    def readings(
        self,
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> tuple[Reading, ...]:
        """As torch's function takes them."""
        run = partial(functional.group_norm, num_groups=num_groups, eps=eps)
        return _reading(input, weight, bias, run, channels=True)


def _standardised(
    inputs: Tensor, mean: Tensor | None, variance: Tensor | None, eps: float
) -> Tensor:
    assert mean is not None
    assert variance is not None
    shape = (1, -1, *(1,) * (inputs.ndim - 2))
    scale = (variance.to(inputs) + eps).rsqrt()
    return (inputs - mean.to(inputs).reshape(shape)) * scale.reshape(shape)


class BatchNormRule(NormRule):
    """``batch_norm``, in evaluation mode."""

    def readings(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> tuple[Reading, ...]:
        """As torch's function takes them."""
        if training or running_mean is None or running_var is None:
            refused = "a batch norm without running statistics mixes the samples"
            return _reading(input, weight, bias, None, channels=True, refused=refused)
        run = partial(_standardised, mean=running_mean, variance=running_var, eps=eps)
        return _reading(input, weight, bias, run, channels=True)


class InstanceNormRule(NormRule):
    """``instance_norm``, with the instance's statistics or with running ones."""

    def readings(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> tuple[Reading, ...]:
        """As torch's function takes them."""
        run: Any = partial(functional.instance_norm, eps=eps)
        if not use_input_stats:
            run = partial(_standardised, mean=running_mean, variance=running_var, eps=eps)
        return _reading(input, weight, bias, run, channels=True)


def _reading(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Any,
    *,
    channels: bool,
    refused: str | None = None,
) -> tuple[Reading, ...]:
    scale = weight if weight is not None else bias
    if scale is None:
        return ()
    settings = Normalisation(normalised, channels, scale.numel())
    return (Reading({"weight": weight, "bias": bias}, (input,), settings, refused),)


def rules() -> dict[Any, NormRule]:
    """Rules of this file by torch function."""
    return {
        functional.layer_norm: LayerNormRule(),
        functional.rms_norm: RmsNormRule(),
        functional.group_norm: GroupNormRule(),
        functional.batch_norm: BatchNormRule(),
        functional.instance_norm: InstanceNormRule(),
    }
