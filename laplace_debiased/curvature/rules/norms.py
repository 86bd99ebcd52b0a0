r"""Scales and shifts of normalisation layers.

A norm's output is x̂ ⊙ w + b, with x̂ the normalised input. The gradients Σ_t g ⊙ x̂ in w and
Σ_t g in b are small, so that their blocks are exact (see ``VectorRows``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.curvature.layers import LayerCall
from laplace_debiased.curvature.rows import LayerRows, VectorRows
from laplace_debiased.options import WeightSharing


class ShapeNormRule:
    """``nn.LayerNorm`` and ``nn.RMSNorm``: a scale per entry of the last dimensions."""

    parameters = ("weight", "bias")
    transposed = False

    def unsupported(self, module: nn.Module) -> str | None:
        """Every instance with a scale is covered."""
        return None

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Input [m, ..., *normalized_shape], columns [m, R, ..., *normalized_shape]."""
        (inputs,), (columns,) = call.inputs, call.columns
        shaped: Any = module
        width = len(shaped.normalized_shape)
        if inputs.ndim <= width:
            raise ValueError(f"{type(module).__name__} got an input without a batch dimension.")

        def summed(values: Tensor) -> VectorRows:
            m, n = values.shape[:2]
            return VectorRows(
                values.flatten(-width).reshape(m, n, -1, shaped.weight.numel()).sum(2)
            )

        weight = None
        if call.weight:
            weight = summed(columns * self._normalised(module, inputs).unsqueeze(1))
        return LayerRows(weight, summed(columns) if call.bias else None)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        sharing: WeightSharing,
        counts: Tensor | None = None,
    ) -> None:
        """A scale is a vector: its one factor is that of the columns."""

    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        if isinstance(module, nn.RMSNorm):
            return functional.rms_norm(inputs, module.normalized_shape, None, module.eps)
        return functional.layer_norm(inputs, module.normalized_shape, None, None, module.eps)


class ChannelNormRule:
    """Batch, group and instance norms: a scale per channel, in evaluation mode."""

    parameters = ("weight", "bias")
    transposed = False

    def unsupported(self, module: nn.Module) -> str | None:
        """A batch norm without running statistics mixes the samples of a batch."""
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            return f"{type(module).__name__} without running statistics mixes the samples"
        return None

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Input [m, C, *size], columns [m, R, C, *size]."""
        (inputs,), (columns,) = call.inputs, call.columns
        assert isinstance(module.weight, Tensor)
        if inputs.ndim < 2 or inputs.shape[1] != len(module.weight):
            raise ValueError(f"{type(module).__name__} got an input without a batch dimension.")
        weight = None
        if call.weight:
            products = columns * self._normalised(module, inputs).unsqueeze(1)
            weight = VectorRows(_over_channels(products))
        return LayerRows(weight, VectorRows(_over_channels(columns)) if call.bias else None)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        sharing: WeightSharing,
        counts: Tensor | None = None,
    ) -> None:
        """A scale is a vector: its one factor is that of the columns."""

    def _normalised(self, module: Any, inputs: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(inputs, module.num_groups, None, None, module.eps)
        mean, variance = module.running_mean, module.running_var
        if mean is None:
            return functional.instance_norm(inputs, eps=module.eps)
        shape = (1, -1, *(1,) * (inputs.ndim - 2))
        scale = (variance.to(inputs) + module.eps).rsqrt()
        return (inputs - mean.to(inputs).reshape(shape)) * scale.reshape(shape)


def _over_channels(values: Tensor) -> Tensor:
    """Sums over positions [m, R, C] of values [m, R, C, *size]."""
    return values.flatten(3).sum(3) if values.ndim > 3 else values
