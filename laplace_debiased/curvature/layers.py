r"""Layers that the layer-wise passes understand, as linear maps shared over positions.

For every layer here, the output at position t of sample n is W a_{n,t} + b. A *rule* turns the
layer's input into the a [m, T, D_in] and the gradient in its output into the g [m, T, D_out],
so that the gradient in W of sample n is Σ_t g_{n,t} a_{n,t}ᵀ (row-major, as ``weight.flatten()``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.autocorrelation import applies_to, patch_covariance
from laplace_debiased.curvature.kernels import input_covariance

class LayerRule(Protocol):
    """How one type of layer is a linear map that is shared over positions."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Why this instance cannot be covered, or None if it can."""

    def input_positions(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Inputs of the linear map [m, T, D_in]."""

    def output_positions(self, module: nn.Module, cotangents: Tensor) -> Tensor:
        """Gradients in its outputs [m, T, D_out]."""

    def input_covariance(
        self, module: nn.Module, inputs: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Σ_n w_n/T Σ_t a_{n,t} a_{n,t}ᵀ [D_in, D_in] of the linear map's inputs."""


class LinearRule:
    """``nn.Linear`` on [m, ..., D_in]; all dimensions between are positions."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Every ``nn.Linear`` is covered."""
        return None

    def input_positions(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """[m, ..., D_in] → [m, T, D_in]."""
        return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])

    def output_positions(self, module: nn.Module, cotangents: Tensor) -> Tensor:
        """[m, ..., D_out] → [m, T, D_out]."""
        return cotangents.reshape(cotangents.shape[0], -1, cotangents.shape[-1])

    def input_covariance(
        self, module: nn.Module, inputs: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Of the inputs as they are."""
        return input_covariance(self.input_positions(module, inputs), weights)


class Conv2dRule:
    """``nn.Conv2d`` without groups; positions are pixels, inputs are im2col patches."""

    def unsupported(self, module: nn.Module) -> str | None:
        """Grouped convolutions are not one linear map."""
        assert isinstance(module, nn.Conv2d)
        if module.groups != 1:
            return f"Conv2d with groups={module.groups} is not supported"
        return None

    def input_positions(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """[m, C_in, H, W] → patches [m, T, C_in·k_h·k_w]."""
        assert isinstance(module, nn.Conv2d)
        if module.kernel_size == (1, 1) and not any(module._reversed_padding_repeated_twice):
            strided = inputs[..., :: module.stride[0], :: module.stride[1]]
            return strided.flatten(2).transpose(1, 2)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = torch.nn.functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
        patches = torch.nn.functional.unfold(
            padded, module.kernel_size, dilation=module.dilation, stride=module.stride
        )
        return patches.transpose(1, 2)

    def output_positions(self, module: nn.Module, cotangents: Tensor) -> Tensor:
        """[m, C_out, H', W'] → [m, T, C_out]."""
        return cotangents.flatten(2).transpose(1, 2)

    def input_covariance(
        self, module: nn.Module, inputs: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Of the patches; from the image's autocorrelation where that is faster."""
        assert isinstance(module, nn.Conv2d)
        if applies_to(module, inputs):
            return patch_covariance(inputs, module.kernel_size, weights)
        return input_covariance(self.input_positions(module, inputs), weights)


_RULES: dict[type[nn.Module], LayerRule] = {nn.Linear: LinearRule(), nn.Conv2d: Conv2dRule()}


def registered_rules() -> Mapping[type[nn.Module], LayerRule]:
    """The layer types that have a rule, read-only."""
    return MappingProxyType(_RULES)


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, or None.

    A subclass has its parent's rule only while it keeps the parent's ``forward``: a subclass that
    computes something else (LoRA, quantised layers) is not the linear map that the rule assumes.
    """
    for kind, rule in _RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    return None


@dataclass(frozen=True, eq=False)
class Layer:
    """A covered layer: its module, its rule, and which of its parameters carry a posterior.

    Args:
        name: qualified name in the model.
        module: the layer itself.
        rule: how it is a linear map.
        weight: qualified parameter name of a covered weight, else None.
        bias: qualified parameter name of a covered bias, else None.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    weight: str | None
    bias: str | None

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Covered parameters of the layer."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)
