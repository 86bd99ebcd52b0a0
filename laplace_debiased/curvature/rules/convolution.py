r"""Convolutions of one to three dimensions, with groups, and their transposes.

A convolution is a linear map from patches to pixels: a_t is the patch that output pixel t reads.
Its transpose writes patches: with x_t the input pixel t and p_t the patch of the cotangent that it
wrote, the gradient in the weight [C_in, C_out·k] is Σ_t x_t p_tᵀ; rows and columns swap roles.
With groups, channels fall into G slices with a weight of their own each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.autocorrelation import applies_to, patch_covariance
from laplace_debiased.curvature.layers import LayerCall, RuleDefaults, require_equal_positions
from laplace_debiased.curvature.rows import (
    BiasRows,
    BlockRows,
    Factor,
    GroupedRows,
    LayerRows,
    MatrixRows,
    input_factor,
)


def windows(
    images: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """Sliding windows [m, C, *positions, *kernel] of images [m, C, *size], without a copy."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        images = images.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return images


def _ungrouped_patches(module: nn.Conv2d, padded: Tensor) -> Tensor:
    """im2col patches [m, T, C·k] by torch's own kernel, for the commonest case."""
    patches = nn.functional.unfold(
        padded, module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return patches.transpose(1, 2)


def _require_images(module: nn.Module, images: Tensor, spatial: int) -> None:
    if images.ndim != spatial + 2:
        raise ValueError(
            f"{type(module).__name__} got an input of shape {tuple(images.shape)}; it needs a "
            f"batch, channels and {spatial} more dimensions."
        )


def _grouped(positions: Tensor, groups: int) -> Tensor:
    """[..., T, G·D] as [G, ..., T, D]."""
    return positions.unflatten(-1, (groups, -1)).movedim(-2, 0)


def _weight_rows(a: Tensor | None, g: Tensor, groups: int, *, transposed: bool) -> BlockRows:
    """Rows from a [m, T, G·D_in] and g [m, R, T, G·D_out]."""
    if groups == 1:
        return MatrixRows(a, g, transposed)
    return GroupedRows(None if a is None else _grouped(a, groups), _grouped(g, groups), transposed)


def _input_factor(a: Tensor, groups: int, counts: Tensor | None) -> Factor:
    return input_factor(a if groups == 1 else _grouped(a, groups), counts)


class ConvRule(RuleDefaults):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with any stride, dilation, padding, groups."""

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Input [m, C_in, *size], columns [m, R, C_out, *size']."""
        (inputs,), (columns,) = call.inputs, call.columns
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        _require_images(module, inputs, len(module.kernel_size))
        g = columns.flatten(3).transpose(2, 3)
        weight = None
        if call.weight:
            a = None if call.columns_only else self.patches(module, inputs)
            require_equal_positions(module, a, g)
            weight = _weight_rows(a, g, module.groups, transposed=False)
        return LayerRows(weight, BiasRows(g) if call.bias else None)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        counts: Tensor | None = None,
    ) -> Factor:
        """Of the patches; from the image's autocorrelation where that is faster."""
        conv: Any = module
        if isinstance(conv, nn.Conv2d) and applies_to(conv, inputs[0]):
            height, width = conv.kernel_size
            return patch_covariance(inputs[0], (height, width), counts)
        return _input_factor(self.patches(conv, inputs[0]), conv.groups, counts)

    def patches(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
        """Patches [m, T, C_in·k], channels outermost, so that groups are slices."""
        padding = module._reversed_padding_repeated_twice
        if all(k == 1 for k in module.kernel_size) and not any(padding):
            for axis, stride in enumerate(module.stride):
                inputs = inputs.unfold(2 + axis, 1, int(stride)).squeeze(-1)
            return inputs.flatten(2).transpose(1, 2)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = nn.functional.pad(inputs, padding, mode=mode)
        if isinstance(module, nn.Conv2d):
            return _ungrouped_patches(module, padded)
        spatial = len(module.kernel_size)
        found = windows(padded, module.kernel_size, module.stride, module.dilation)
        patches = found.flatten(2 + spatial).flatten(2, 1 + spatial)  # [m, C, T, k]
        return patches.transpose(1, 2).flatten(2)


class ConvTransposeRule(RuleDefaults):
    """``nn.ConvTranspose1d``, ``2d`` and ``3d``."""

    transposed = True

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Input [m, C_in, *size], columns [m, R, C_out, *size']."""
        (inputs,), (columns,) = call.inputs, call.columns
        assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        _require_images(module, inputs, len(module.kernel_size))
        bias = BiasRows(columns.flatten(3).transpose(2, 3)) if call.bias else None
        if not call.weight:
            return LayerRows(None, bias)
        a = None if call.columns_only else inputs.flatten(2).transpose(1, 2)
        g = self.patches(module, columns.flatten(0, 1), inputs.shape[2:])
        g = g.unflatten(0, columns.shape[:2])
        return LayerRows(_weight_rows(a, g, module.groups, transposed=True), bias)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        counts: Tensor | None = None,
    ) -> Factor:
        """Of the input's pixels."""
        conv: Any = module
        pixels = inputs[0].flatten(2).transpose(1, 2)
        return _input_factor(pixels, conv.groups, counts)

    def patches(
        self,
        module: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
        cotangents: Tensor,
        size: torch.Size,
    ) -> Tensor:
        """Patches [k, T, C_out·kernel] of cotangents [k, C_out, *size'] that each input wrote."""
        sides: tuple[Any, ...] = tuple(module.padding)
        padding = [int(side) for side in reversed(sides) for _ in range(2)]
        padded = nn.functional.pad(cotangents, padding)
        found = windows(padded, module.kernel_size, module.stride, module.dilation)
        # Output padding adds rows that no input wrote; with a dilation there may be windows there.
        for axis, length in enumerate(size):
            found = found.narrow(2 + axis, 0, length)
        patches = found.flatten(2 + len(size)).flatten(2, 1 + len(size))
        return patches.transpose(1, 2).flatten(2)
