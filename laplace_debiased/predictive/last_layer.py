r"""The last-layer predictive in closed form: features in, no Jacobian.

With features φ of an input and a weight block of precision table τ [C, D],

    Cov[f] = U_B diag_i(Σ_j (φᵀ u_A,j)² / τ_ij) U_Bᵀ + U_b diag(1/τ_b) U_bᵀ,

and with thin sides the same in their coordinates (:mod:`laplace_debiased.curvature.rows.sides`). Of
K chosen outputs of each sample only these rows of U_B are read; between samples n and n' stand
products of φ̃_n,j φ̃_n',j in place of squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.curvature.rows import sides
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.operators import EigenKron
from laplace_debiased.predictive.kron import KronPredictor
from laplace_debiased.predictive.predictor import Ask, OutputMoments, beside


@dataclass(frozen=True, eq=False)
class LastLayerKronPredictor(KronPredictor):
    """A Kronecker curvature of the last layer with the network that it belongs to."""

    engine: FeaturePass

    def under(self, ask: Ask, precision: EigenKron, priors: Tensor | None = None) -> OutputMoments:
        """See :class:`Predictor`."""
        ask.selection.require_no_positions()
        outputs, features = self.engine.features(ask.inputs, differentiable=ask.differentiable)
        with outside_inference_mode(), torch.set_grad_enabled(ask.differentiable):
            if not ask.differentiable:
                outputs, features = outputs.detach(), features.detach()
            chosen = ask.chosen(outputs)
            terms = []
            for name, block in zip(self.names, precision.blocks, strict=True):
                assert block.output_basis is not None
                rows = BasisRows.of(block.output_basis, chosen, ask.diagonal)
                is_weight = name == self.engine.head.weight
                terms.append(
                    (rows, _scales(features, block.input_basis, ask) if is_weight else None)
                )
            weights = self.weights(precision, priors).values()
            swept = []
            for tables in zip(*(each.each() for each in weights), strict=True):
                total = features.new_zeros(len(features), *[1] * (ask.joint + 2 - ask.diagonal))
                for (rows, scales), table in zip(terms, tables, strict=True):
                    total = total + rows.turned_back(table if scales is None else scales(table))
                if ask.joint:
                    m, n_outputs = outputs.shape
                    total = total.expand(m, m, -1, -1).transpose(1, 2)
                    total = total.reshape(m * n_outputs, m * n_outputs)
                swept.append(total.unsqueeze(0))
            return OutputMoments(outputs, beside(swept, 0), chosen)


def _scales(features: Tensor, inputs: Tensor | None, ask: Ask) -> Callable[[Tensor], Tensor]:
    """From 1/τ to Σ_j (φᵀ u_A,j)² / τ_ij [m, I]; the last entry is outside of a thin side."""
    if ask.joint:
        rotated = sides.coordinates(features, inputs)
        return lambda table: torch.einsum(
            "nj,kj,ij->nki", rotated, rotated, sides.spread(table, inputs)
        )
    squares = sides.energies(features, inputs)
    return lambda table: squares @ table.T


@dataclass(frozen=True, eq=False)
class BasisRows:
    """Rows of an output basis, at all outputs or at K of every sample.

    Attributes:
        inside: U_B at these outputs, [C, r] or [m, K, r]; its squares for variances.
        outside: of the unit vectors of these outputs what lies outside of a thin basis: their Gram
            matrix [..., K, K], or squared norms [..., K]; None where the basis is whole.
        diagonal: variances only.
    """

    inside: Tensor
    outside: Tensor | None
    diagonal: bool

    @classmethod
    def of(cls, basis: Tensor, chosen: Tensor | None, diagonal: bool) -> BasisRows:
        """Of U_B [C, r]."""

        def gram(index: Tensor) -> Tensor:
            rest = -basis[index] @ basis.T
            rest[torch.arange(len(index), device=rest.device), index] += 1.0
            return rest.square().sum(-1) if diagonal else rest @ rest.T

        inside, outside = basis if chosen is None else basis[chosen], None
        if sides.is_thin(basis) and chosen is not None:
            # Sample by sample: the part outside of a basis has C entries.
            outside = torch.stack([gram(index) for index in chosen])
        elif sides.is_thin(basis) and diagonal:
            outside = sides.entry_squares(basis)[:, -1]
        elif sides.is_thin(basis):
            outside = gram(torch.arange(len(basis), device=basis.device))
        return cls(inside.square() if diagonal else inside, outside, diagonal)

    def turned_back(self, scales: Tensor) -> Tensor:
        """U diag(s) Uᵀ [..., K, K] at these outputs or its diagonal, of s [..., r] (one more)."""
        r = self.inside.shape[-1]
        along = scales[..., :r]
        if not self.diagonal:
            found = (self.inside * along.unsqueeze(-2)) @ self.inside.mT
        elif self.inside.ndim == 2:
            found = along @ self.inside.T
        else:
            found = (self.inside @ along.unsqueeze(-1)).squeeze(-1)
        if self.outside is None:
            return found
        rest = scales[..., r, None] if self.diagonal else scales[..., r, None, None]
        return found + rest * self.outside
