r"""Convolutions of one to three dimensions, with groups, and their transposes.

A convolution is a linear map from patches to pixels: a_t is the patch that output pixel t reads.
Its transpose writes patches: with x_t the input pixel t and p_t the patch of the cotangent that it
wrote, the gradient in the weight [C_in, C_out·k] is Σ_t x_t p_tᵀ; rows and columns swap roles.
With groups, channels fall into G slices with a weight of their own each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from laplace_debiased.curvature.operations.autocorrelation import (
    Kernel,
    Sizes,
    applies_to,
    patch_covariance,
)
from laplace_debiased.curvature.operations.call import OperationCall, Reading
from laplace_debiased.curvature.operations.linear import LinearRule
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import Factor


def _each(value: Any, n: int) -> Sizes:
    values = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    return values * n if len(values) == 1 else values


def windows(images: Tensor, kernel: Kernel) -> Tensor:
    """Sliding windows [m, C, *positions, *kernel] of images [m, C, *size], without a copy."""
    steps = zip(kernel.size, kernel.stride, kernel.dilation, strict=True)
    for axis, (k, s, d) in enumerate(steps):
        images = images.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return images


def patches(images: Tensor, kernel: Kernel) -> Tensor:
    """Patches [m, T, C·k] of images [m, C, *size], channels outermost: groups are slices."""
    spatial = len(kernel.size)
    if all(k == 1 for k in kernel.size) and not any(kernel.pads):
        for axis, stride in enumerate(kernel.stride):
            images = images.unfold(2 + axis, 1, stride).squeeze(-1)
        return images.flatten(2).transpose(1, 2)
    padded = functional.pad(images, kernel.pads)
    if spatial == 2:  # torch's own kernel, for the commonest case
        unfolded = functional.unfold(
            padded, kernel.size, dilation=kernel.dilation, stride=kernel.stride
        )
        return unfolded.transpose(1, 2)
    return _as_positions(windows(padded, kernel), spatial)


def _as_positions(found: Tensor, spatial: int) -> Tensor:
    """Windows [m, C, *positions, *kernel] as patches [m, T, C·k]."""
    found = found.flatten(2 + spatial).flatten(2, 1 + spatial)  # [m, C, T, k]
    return found.transpose(1, 2).flatten(2)


def _grouped(call: OperationCall, positions: Tensor) -> Tensor:
    """[..., T, G·D] as [G, ..., T, D]; as it is where there is one group."""
    groups = call.settings.groups
    return positions if groups == 1 else positions.unflatten(-1, (groups, -1)).movedim(-2, 0)


def _pixels(call: OperationCall, columns: Tensor) -> Tensor:
    """Columns [m, R, (k,) C, *size] as [m, R, T, C]."""
    if call.folded:
        columns = columns.movedim(2, 3)  # [m, R, C, k, *size]: k is one more spatial dimension
    return columns.flatten(3).transpose(2, 3)


class _ConvRule(LinearRule):
    """What both directions do alike."""

    def bias_positions(self, call: OperationCall, columns: Tensor) -> Tensor:
        return _pixels(call, columns)

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Inputs [m, C_in, *size], columns [m, R, C_out, *size]."""
        spatial, images = len(call.settings.size), call.inputs[0]
        if slot != "bias" and images.ndim != spatial + 2 + call.folded:
            raise ValueError(
                f"{call.operation} got an input of shape {tuple(images.shape)}; it needs a batch, "
                f"channels and {spatial} more dimensions."
            )
        return super().rows(call, slot, columns)


def _same_padding(size: Sizes, dilation: Sizes) -> tuple[tuple[int, int], ...]:
    total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
    return tuple((t // 2, t - t // 2) for t in total)


class ConvRule(_ConvRule):
    """``conv1d``, ``conv2d`` and ``conv3d`` with any stride, dilation, padding, groups."""

    def readings(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> tuple[Reading, ...]:
        size = tuple(weight.shape[2:])
        n, dilation = len(size), _each(dilation, len(size))
        if padding == "same":
            pads = _same_padding(size, dilation)
        else:
            pads = tuple((p, p) for p in _each(0 if padding == "valid" else padding, n))
        kernel = Kernel(size, _each(stride, n), pads, dilation, groups)
        parameters = {"weight": weight, "bias": bias}
        return (Reading(parameters, (input,), kernel, whole=groups > 1),)

    def input_positions(self, call: OperationCall) -> Tensor:
        """Patches [m, T, C_in·k]."""
        (images,) = call.inputs
        found = patches(call.flat(images), call.settings)
        return _grouped(call, found.reshape(len(images), -1, found.shape[-1]))

    def output_positions(self, call: OperationCall, columns: Tensor) -> Tensor:
        """Pixels [m, R, T, C_out]."""
        return _grouped(call, _pixels(call, columns))

    def input_factor(
        self, call: OperationCall, slot: str, counts: Tensor | None = None
    ) -> Factor | None:
        """Of the patches; from the image's autocorrelation where that is faster."""
        images, kernel = call.inputs[0], call.settings
        if slot == "weight" and not call.folded and applies_to(kernel, images):
            return patch_covariance(images, kernel.size, counts)
        return super().input_factor(call, slot, counts)


class ConvTransposeRule(_ConvRule):
    """``conv_transpose1d``, ``2d`` and ``3d``."""

    transposed = True

    def readings(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> tuple[Reading, ...]:
        """As torch's functions take them; the weight is [C_in, C_out / G, *kernel]."""
        n = weight.ndim - 2
        pads = tuple((p, p) for p in _each(padding, n))
        kernel = Kernel(tuple(weight.shape[2:]), _each(stride, n), pads, _each(dilation, n), groups)
        return (Reading({"weight": weight, "bias": bias}, (input,), kernel, whole=True),)

    def input_positions(self, call: OperationCall) -> Tensor:
        """Pixels [m, T, C_in]."""
        (images,) = call.inputs
        if call.folded:
            images = images.movedim(1, 2)
        return _grouped(call, images.flatten(2).transpose(1, 2))

    def output_positions(self, call: OperationCall, columns: Tensor) -> Tensor:
        """Patches [m, R, T, C_out·k] of the columns that each input pixel wrote."""
        m, n_columns = columns.shape[:2]
        kernel, size = call.settings, call.inputs[0].shape[2 + call.folded :]
        images = call.flat(columns.flatten(0, 1))
        found = windows(functional.pad(images, kernel.pads), kernel)
        # Output padding adds rows that no input wrote; with a dilation there may be windows there.
        for axis, length in enumerate(size):
            found = found.narrow(2 + axis, 0, length)
        flat = _as_positions(found, len(size))
        return _grouped(call, flat.reshape(m, n_columns, -1, flat.shape[-1]))


RULES: dict[Any, _ConvRule] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), ConvRule()),
    **dict.fromkeys(
        (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        ConvTransposeRule(),
    ),
}
