r"""Scales and shifts of normalisation layers.

A norm's output is x̂ ⊙ w + b, with x̂ the normalised input. The gradients Σ_t g ⊙ x̂ in w and
Σ_t g in b are small, so that their blocks are exact (see ``VectorRows``).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.curvature.layers import LayerCall, RuleDefaults
from laplace_debiased.curvature.rows import LayerRows, VectorRows


class _ScaleRule(RuleDefaults):
    """Rows of x̂ ⊙ w + b. A subclass normalises, and sums what has the output's shape."""

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Columns [m, R, *output shape] times x̂ for the scale, as they are for the shift."""
        (inputs,), (columns,) = call.inputs, call.columns
        if not self._has_batch(module, inputs):
            raise ValueError(f"{type(module).__name__} got an input without a batch dimension.")
        weight = None
        if call.weight:
            products = columns * self._normalised(module, inputs).unsqueeze(1)
            weight = VectorRows(self._summed(module, products))
        return LayerRows(weight, VectorRows(self._summed(module, columns)) if call.bias else None)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        counts: Tensor | None = None,
    ) -> None:
        """A scale is a vector: its one factor is that of the columns."""

    @abstractmethod
    def _has_batch(self, module: Any, inputs: Tensor) -> bool:
        """Whether the inputs have a batch dimension in front of what the layer normalises."""

    @abstractmethod
    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        """x̂ of inputs [m, ...]."""

    @abstractmethod
    def _summed(self, module: Any, values: Tensor) -> Tensor:
        """Sums over positions [m, R, P] of values [m, R, *output shape]."""


class ShapeNormRule(_ScaleRule):
    """``nn.LayerNorm`` and ``nn.RMSNorm``: a scale per entry of the last dimensions."""

    def _has_batch(self, module: Any, inputs: Tensor) -> bool:
        return inputs.ndim > len(module.normalized_shape)

    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        if isinstance(module, nn.RMSNorm):
            return functional.rms_norm(inputs, module.normalized_shape, None, module.eps)
        return functional.layer_norm(inputs, module.normalized_shape, None, None, module.eps)

    def _summed(self, module: Any, values: Tensor) -> Tensor:
        return values.reshape(*values.shape[:2], -1, module.weight.numel()).sum(2)


class ChannelNormRule(_ScaleRule):
    """Batch, group and instance norms: a scale per channel, in evaluation mode."""

    def unsupported(self, module: nn.Module) -> str | None:
        """A batch norm without running statistics mixes the samples of a batch."""
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return f"{type(module).__name__} without running statistics mixes the samples"
        return None

    def _has_batch(self, module: Any, inputs: Tensor) -> bool:
        return inputs.ndim >= 2 and inputs.shape[1] == len(module.weight)

    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(inputs, module.num_groups, None, None, module.eps)
        mean, variance = module.running_mean, module.running_var
        if mean is None:
            return functional.instance_norm(inputs, eps=module.eps)
        shape = (1, -1, *(1,) * (inputs.ndim - 2))
        scale = (variance.to(inputs) + module.eps).rsqrt()
        return (inputs - mean.to(inputs).reshape(shape)) * scale.reshape(shape)

    def _summed(self, module: Any, values: Tensor) -> Tensor:
        return values.flatten(3).sum(3) if values.ndim > 3 else values
