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


def weight_curvature(
    a: Tensor, g: Tensor, output_basis: Tensor, input_basis: Tensor, coefficients: Tensor
) -> Tensor:
    r"""Σ_n c_n Σ_r (u_iᵀ G_{n,r} u_j)² for every direction (i, j), per row of ``coefficients``.

    With c_n = 1/m̃ this is the directional curvature u_ijᵀ G_B̃ u_ij of the generalized
    Gauss-Newton matrix (George et al. 2018, eq. 9). A single position makes G of rank one, and the
    square splits into a product of squares: no gradient is formed.

    Args:
        a: inputs [m, T, D_in].
        g: back-propagated columns [m, R, T, D_out].
        output_basis: U_B [D_out, D_out].
        input_basis: U_A [D_in, D_in].
        coefficients: c [m].

    Returns:
        [D_out, D_in].
    """
    coefficients = coefficients.to(a.dtype)
    if a.shape[1] == 1:
        outputs = (g[:, :, 0] @ output_basis).square().sum(1)
        inputs = (a[:, 0] @ input_basis).square()
        return (outputs * coefficients.unsqueeze(-1)).T @ inputs
    squares = rotated_gradients(a, g, output_basis, input_basis).square().sum(1)
    return torch.tensordot(coefficients, squares, dims=1)
