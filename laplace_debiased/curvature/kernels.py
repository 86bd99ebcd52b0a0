r"""The layer-wise kernels: tensors in, tensors out, no model and no loop over samples.

Symbols, for one layer and m samples:

* a [m, T, D_in]: inputs at T positions;
* g [m, R, T, D_out]: R back-propagated columns at these positions;
* G_{n,r} = Σ_t g_{n,r,t} a_{n,t}ᵀ [D_out, D_in]: the columns' gradients in the weight;
* U_B [D_out, D_out], U_A [D_in, D_in]: eigenbasis of the two Kronecker factors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def input_covariance(a: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over samples of the mean over positions, Σ_n w_n/T Σ_t a_{n,t} a_{n,t}ᵀ [D_in, D_in].

    Args:
        a: inputs [m, T, D_in].
        weights: w [m], or None for ones.
    """
    m, positions, width = a.shape
    flat = a.reshape(m * positions, width)
    if weights is None:
        return flat.T @ flat / positions
    scaled = (a * (weights.to(a.dtype) / positions).reshape(m, 1, 1)).reshape(flat.shape)
    return scaled.T @ flat


def weight_gradients(a: Tensor, g: Tensor) -> Tensor:
    """G_{n,r} = Σ_t g_{n,r,t} a_{n,t}ᵀ [m, R, D_out, D_in]."""
    m, columns, positions, outs = g.shape
    stacked = g.transpose(2, 3).reshape(m, columns * outs, positions)
    return torch.bmm(stacked, a).reshape(m, columns, outs, a.shape[-1])


def rotated_gradients(a: Tensor, g: Tensor, output_basis: Tensor, input_basis: Tensor) -> Tensor:
    r"""U_Bᵀ G_{n,r} U_A [m, R, D_out, D_in].

    Each side can be rotated before the sum over positions or after it. Per sample, rotating the
    right side costs T·D_in² multiplications before and R·D_out·D_in² after; the left side
    R·T·D_out² before and R·D_out²·D_in after. The cheaper order is taken on either side: in a
    ResNet's first stage T = 1024 ≫ R·D_out, in its last T = 64 ≪ R·D_out.
    """
    _, columns, positions, outs = g.shape
    width = a.shape[-1]
    right_first = positions <= columns * outs
    left_first = positions <= width
    if right_first:
        a = a @ input_basis
    if left_first:
        g = g @ output_basis
    rotated = weight_gradients(a, g)
    if not left_first:
        rotated = output_basis.T @ rotated
    if not right_first:
        rotated = rotated @ input_basis
    return rotated
