r"""Softmax curvature of a last layer in closed form: m·C² operations in place of m·C³.

A sample with class probabilities p and weight w has the loss Hessian w (diag p − p pᵀ) in its
outputs. It is known from one column, q = √(w p), with w = Σ_c q_c² and p = q²/w; no root of C − 1
columns has to be formed:

* factor of the columns: B = Σ_n w_n (diag p_n − p_n p_nᵀ);
* directional curvature: uᵀ (diag p − p pᵀ) u = Σ_c p_c u_c² − (Σ_c p_c u_c)².

In a trained network one class has nearly all of p, and both are differences of numbers close to
each other. So everything is written in what the largest class k leaves, r_c = p_c for c ≠ k and
ρ = Σ_c r_c = 1 − p_k, and no digit of a small ρ is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from laplace_debiased.curvature.operations.call import OperationCall
from laplace_debiased.curvature.operations.linear import LinearRule
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.parameters import BiasRows, MatrixRows
from laplace_debiased.curvature.rows.sides import energies, is_thin
from laplace_debiased.curvature.rows.size import Basis


class _Leftover(NamedTuple):
    """Samples by their largest class and what it leaves."""

    weights: Tensor  # w [m]
    top: Tensor  # k, the largest class [m]
    rest: Tensor  # r [m, C], zero at the largest class
    mass: Tensor  # ρ [m]


def _leftover(q: Tensor) -> _Leftover:
    squares = q.square()
    weights, top = squares.sum(-1), squares.argmax(-1)
    p = squares / weights.clamp_min(torch.finfo(q.dtype).tiny).unsqueeze(-1)
    rest = p.scatter(-1, top.unsqueeze(-1), 0.0)
    return _Leftover(weights, top, rest, rest.sum(-1))


def softmax_covariance(q: Tensor) -> Tensor:
    """Σ_n w_n (diag p_n − p_n p_nᵀ) [C, C] of q = √(w p) [m, C], summed over samples."""
    left = _leftover(q)
    kept = left.weights * (1.0 - left.mass)
    diagonal = (left.weights @ left.rest).index_add(0, left.top, kept * left.mass)
    cross = q.new_zeros(q.shape[1], q.shape[1])
    cross = cross.index_add(0, left.top, kept.unsqueeze(-1) * left.rest)
    scaled = left.weights.sqrt().unsqueeze(-1) * left.rest
    return torch.diag(diagonal) - scaled.T @ scaled - cross - cross.T


def softmax_curvature(q: Tensor, basis: Tensor) -> Tensor:
    """w_n u_iᵀ (diag p_n − p_n p_nᵀ) u_i [m, I] of q = √(w p) [m, C] and columns u [C, I], float64.

    Directions along which little curvature lies leave differences of large numbers, which float32
    would not resolve. A constant adds nothing to a direction, so each is centred first.
    """
    left = _leftover(q.double())
    u = basis.double()
    u = u - u.mean(0)
    mass, at_top = left.mass.unsqueeze(-1), u[left.top]
    first, second = left.rest @ u, left.rest @ u.square()
    spread = second - 2.0 * at_top * first + at_top.square() * mass
    shift = first - at_top * mass
    return left.weights.unsqueeze(-1) * (spread - shift.square()).clamp_min(0.0)


def _softmax_energies(q: Tensor, basis: Tensor) -> Tensor:
    """:func:`softmax_curvature`; of a thin basis last what is left of the trace."""
    along = softmax_curvature(q, basis)
    if not is_thin(basis):
        return along
    left = _leftover(q.double())
    trace = (left.rest * (1.0 - left.rest)).sum(-1) + left.mass * (1.0 - left.mass)
    outside = (left.weights * trace - along.sum(-1)).clamp_min(0.0)
    return torch.cat([along, outside.unsqueeze(-1)], dim=-1)


@dataclass(frozen=True, eq=False)
class SoftmaxMatrixRows(MatrixRows):
    """Rows of the layer's weight, all columns of whose root q stands for.

    Attributes:
        inputs: φ [m, 1, D], or what gives them.
        columns: q [m, 1, 1, C].
    """

    def column_factor(self, *, summed_bias: bool) -> Tensor:
        """In closed form."""
        return softmax_covariance(self.columns[:, 0, 0])

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        """In closed form."""
        outputs, inputs = self._bases(basis)
        rotated = energies(self.read[:, 0], inputs)
        curvature = _softmax_energies(self.columns[:, 0, 0], outputs)
        return (curvature * coefficients.double().unsqueeze(-1)).to(rotated).T @ rotated


@dataclass(frozen=True, eq=False)
class SoftmaxBiasRows(BiasRows):
    """Rows of the layer's bias, likewise.

    Attributes:
        columns: q [m, 1, 1, C].
    """

    def column_factor(self, *, summed_bias: bool) -> Tensor:
        """In closed form."""
        return softmax_covariance(self.columns[:, 0, 0])

    def curvature(self, basis: Basis, coefficients: Tensor) -> Tensor:
        """In closed form."""
        assert basis.output_basis is not None
        curvature = _softmax_energies(self.columns[:, 0, 0], basis.output_basis)
        return (coefficients.double() @ curvature).to(self.columns)


class SoftmaxHeadRule(LinearRule):
    """A last linear layer under a softmax, whose one column is q = √(w p)."""

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Rows in closed form."""
        rows = super().rows(call, slot, columns)
        if isinstance(rows, MatrixRows):
            return SoftmaxMatrixRows(rows.inputs, rows.columns)
        return SoftmaxBiasRows(rows.columns)
