r"""Input covariance of a convolution from the image's autocorrelation, without patches.

A block of the patches' covariance, Σ_t x_c(t + k) x_c'(t + k'), depends on the kernel positions
k, k' through their offset alone, but for what lies at the border: with p = t + k it is
Σ_p x_c(p) x_c'(p + k' − k), over the pixels p that the position k can reach. A 3×3 kernel has 81
pairs of positions and 25 offsets: one correlation of the image with itself replaces the im2col
array and its Gram matrix. What a position never reaches is one border row, one border column, or
both; there the partner p + k' − k lies on the same row (column), or outside of the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

_MIN_PIXELS = 128
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """How a convolution moves over its input, one number per spatial dimension.

    Attributes:
        size: of the kernel.
        stride: between windows.
        padding: zeros before and after each dimension.
        dilation: between entries of the kernel.
        groups: of channels.
    """

    size: Sizes
    stride: Sizes
    padding: tuple[tuple[int, int], ...]
    dilation: Sizes
    groups: int

    @property
    def pads(self) -> list[int]:
        """As ``torch.nn.functional.pad`` takes it."""
        return [side for sides in reversed(self.padding) for side in sides]


def applies_to(kernel: Kernel, inputs: Tensor) -> bool:
    """Whether :func:`patch_covariance` covers a convolution, and is the faster way.

    It covers kernel sizes 1 and 3 at stride 1 with zeros around that keep the size. On CPU the
    correlation is the library's weight gradient, 2 to 8 times as fast as im2col on images of
    16×16 pixels and more, slower on small ones. Elsewhere its reduced-precision kernels could
    cost digits. Patches that are fewer than their entries are kept as they are.
    """
    if kernel.groups > 1 or len(kernel.size) != 2 or inputs.device.type != "cpu":
        return False
    centred = tuple((size // 2, size // 2) for size in kernel.size)
    pixels = inputs.shape[2] * inputs.shape[3]
    return (
        kernel.padding == centred
        and set(kernel.size) <= {1, 3}
        and kernel.size != (1, 1)
        and min(inputs.shape[2:]) >= 3
        and pixels >= _MIN_PIXELS
        and len(inputs) * pixels >= inputs.shape[1] * math.prod(kernel.size)
        and set(kernel.stride) == {1}
        and set(kernel.dilation) == {1}
    )


def patch_covariance(
    inputs: Tensor, kernel_size: tuple[int, int], weights: Tensor | None = None
) -> Tensor:
    r"""Σ_n w_n/T Σ_t a_{n,t} a_{n,t}ᵀ of im2col patches a, [C·k_h·k_w, C·k_h·k_w].

    Args:
        inputs: images [m, C, H, W], H ≥ k_h and W ≥ k_w, padded with zeros to keep their size.
        kernel_size: (k_h, k_w), each 1 or 3.
        weights: w [m], or None for ones.
    """
    _, channels, height, width = inputs.shape
    k_h, k_w = kernel_size
    left = inputs if weights is None else inputs * weights.to(inputs).reshape(-1, 1, 1, 1)
    whole = _correlation(left, inputs, (k_h - 1, k_w - 1))
    rows = [_missed(k_y - k_h // 2, height) for k_y in range(k_h)]
    columns = [_missed(k_x - k_w // 2, width) for k_x in range(k_w)]
    # Along a missed row only offsets within the row are left, and likewise for columns.
    row_cuts = [None if y is None else _line(left[:, :, y], inputs[:, :, y], k_w - 1) for y in rows]
    column_cuts = [
        None if x is None else _line(left[..., x], inputs[..., x], k_h - 1) for x in columns
    ]
    covariance = inputs.new_empty(channels, k_h, k_w, channels, k_h, k_w)
    for k_y, k_x in product(range(k_h), range(k_w)):
        ys, xs = slice(k_h - 1 - k_y, 2 * k_h - 1 - k_y), slice(k_w - 1 - k_x, 2 * k_w - 1 - k_x)
        block = covariance[:, k_y, k_x]
        block.copy_(whole[:, :, ys, xs])
        y, x = rows[k_y], columns[k_x]
        row_cut, column_cut = row_cuts[k_y], column_cuts[k_x]
        if row_cut is not None:
            block[:, :, k_y] -= row_cut[..., xs]
        if column_cut is not None:
            block[..., k_x] -= column_cut[..., ys]
        if y is not None and x is not None:
            block[:, :, k_y, k_x] += left[:, :, y, x].T @ inputs[:, :, y, x]
    side = channels * k_h * k_w
    flat = covariance.reshape(side, side) / (height * width)
    return (flat + flat.T) / 2  # round-off of the border terms is not symmetric


def _missed(shift: int, length: int) -> int | None:
    """The pixel that a kernel position at ``shift`` from the centre never reads, along one axis."""
    if shift == 0:
        return None
    return 0 if shift > 0 else length - 1


def _correlation(left: Tensor, right: Tensor, reach: tuple[int, int]) -> Tensor:
    """Σ_{n,p} left_c(p) right_c'(p + d) [C, C, 2·reach_y + 1, 2·reach_x + 1], zeros outside."""
    channels = left.shape[1]
    shape = (channels, channels, 2 * reach[0] + 1, 2 * reach[1] + 1)
    return conv2d_weight(right, shape, left, padding=reach)


def _line(left: Tensor, right: Tensor, reach: int) -> Tensor:
    """Σ_{n,p} left_c(p) right_c'(p + d) of lines [m, C, L]: [C, C, 2·reach + 1]."""
    m, channels, length = left.shape
    near = nn.functional.pad(right, (reach, reach)).unfold(-1, length, 1)  # [m, C, offsets, L]
    stacked = near.permute(0, 3, 1, 2).reshape(m * length, -1)
    flat = left.transpose(1, 2).reshape(m * length, channels)
    return (flat.T @ stacked).reshape(channels, channels, -1)
