r"""The last-layer predictive in closed form: features in, no Jacobian.

With features φ of an input and a weight block of precision table τ [C, D],

    Cov[f] = U_B diag_i(Σ_j (φᵀ u_A,j)² / τ_ij) U_Bᵀ + U_b diag(1/τ_b) U_bᵀ,

and with thin sides the same in their coordinates (:mod:`laplace_debiased.curvature.rows.sides`). Of
K chosen outputs of each sample only these rows of U_B are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.curvature.rows import sides
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.operators import EigenKron
from laplace_debiased.predictive.functional import NamedBlocks
from laplace_debiased.predictive.kron import KronPredictor
from laplace_debiased.predictive.predictor import OutputCovariance, OutputMoments, Sweep
from laplace_debiased.predictive.selection import ALL_OUTPUTS, OutputSelection


@dataclass(frozen=True, eq=False)
class LastLayerKronPredictor(KronPredictor):
    """A Kronecker curvature of the last layer with the network that it belongs to."""

    engine: FeaturePass

    def moments(
        self,
        inputs: Any,
        precision: EigenKron,
        covariance: OutputCovariance,
        selection: OutputSelection = ALL_OUTPUTS,
        *,
        differentiable: bool = False,
    ) -> OutputMoments:
        """Mean and covariance of the outputs: see ``Predictor``."""
        selection.require_no_positions()
        outputs, features = self.engine.features(inputs, differentiable=differentiable)
        with outside_inference_mode(), torch.set_grad_enabled(differentiable):
            if not differentiable:
                outputs, features = outputs.detach(), features.detach()
            chosen = None if covariance is OutputCovariance.JOINT else selection.chosen(outputs)
            rows = self._rows(chosen)
            blocks = NamedBlocks(self.names, precision)
            found = covariance_of_features(self.engine, blocks, features, covariance, rows)
            return OutputMoments(outputs, found, chosen)

    def sweep(
        self,
        inputs: Any,
        h: Tensor,
        priors: Tensor,
        selection: OutputSelection = ALL_OUTPUTS,
        *,
        diagonal: bool,
    ) -> Sweep:
        """Moments under a grid of priors: see ``Predictor``."""
        kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
        with torch.no_grad():
            outputs, features = self.engine.features(inputs)
            chosen = selection.chosen(outputs)
            rows = self._rows(chosen)
            scaled = self.curvature * h
            unit = torch.ones((), dtype=scaled.dtype, device=scaled.device)
            covariances = [
                covariance_of_features(
                    self.engine, NamedBlocks(self.names, operator), features, kind, rows
                )
                for operator in (*(scaled + prior for prior in priors), scaled * 0.0 + unit)
            ]
        return Sweep(outputs.detach(), torch.stack(covariances[:-1]), covariances[-1], chosen)

    def _rows(self, chosen: Tensor | None) -> ChosenRows | None:
        """Rows of the output bases at the chosen outputs; the same under every prior."""
        if chosen is None:
            return None
        blocks = NamedBlocks(self.names, self.curvature)
        bases = {name: blocks.output_basis(name) for name in self.names}
        return ChosenRows({name: BasisRows.of(basis, chosen) for name, basis in bases.items()})


@dataclass(frozen=True, eq=False)
class BasisRows:
    """Rows of an output basis at K outputs of every sample.

    Attributes:
        inside: U_B at the chosen outputs [m, K, r].
        outside: Gram matrix [m, K, K] of what lies outside of a thin basis, of the unit vectors of
            these outputs; None where the basis is whole.
    """

    inside: Tensor
    outside: Tensor | None

    @classmethod
    def of(cls, basis: Tensor, chosen: Tensor) -> BasisRows:
        """Of U_B [C, r], sample by sample: the part outside of a basis has C entries."""
        inside = basis[chosen]
        if not sides.is_thin(basis):
            return cls(inside, None)
        grams = []
        for index, rows in zip(chosen, inside, strict=True):
            rest = -rows @ basis.T
            rest[torch.arange(len(index), device=rest.device), index] += 1.0
            grams.append(rest @ rest.T)
        return cls(inside, torch.stack(grams))

    def covariance(self, scales: Tensor) -> Tensor:
        """U diag(s) Uᵀ [m, K, K] at these outputs, of s [m, r] or [r] (one more for the rest)."""
        r = self.inside.shape[-1]
        found = (self.inside * scales[..., None, :r]) @ self.inside.mT
        if self.outside is None:
            return found
        return found + scales[..., r, None, None] * self.outside

    def variance(self, scales: Tensor) -> Tensor:
        """The diagonal of :meth:`covariance` [m, K]."""
        r = self.inside.shape[-1]
        found = (self.inside.square() * scales[..., None, :r]).sum(-1)
        if self.outside is None:
            return found
        return found + scales[..., r, None] * self.outside.diagonal(dim1=-2, dim2=-1)


@dataclass(frozen=True, eq=False)
class ChosenRows:
    """Rows of the bases of the layer's blocks, by parameter name."""

    bases: Mapping[str, BasisRows]

    def moments(
        self, feature_pass: FeaturePass, blocks: NamedBlocks, features: Tensor, *, diagonal: bool
    ) -> Tensor:
        """Covariance [m, K, K], or variances [m, K], of the chosen outputs."""
        head = feature_pass.head
        total = features.new_zeros(())
        for name in (head.weight, head.bias):
            if name is None:
                continue
            rows = self.bases[name]
            if name == head.weight:
                scales = _output_scales(blocks, name, features)
            else:
                scales = blocks.table(name).reciprocal()
            total = total + (rows.variance(scales) if diagonal else rows.covariance(scales))
        return total


def covariance_of_features(
    feature_pass: FeaturePass,
    blocks: NamedBlocks,
    features: Tensor,
    covariance: OutputCovariance,
    rows: ChosenRows | None = None,
) -> Tensor:
    """Covariance of the outputs that belong to the features φ [m, D]: all, or the chosen ones."""
    if rows is not None:
        diagonal = covariance is OutputCovariance.DIAGONAL
        return rows.moments(feature_pass, blocks, features, diagonal=diagonal)
    match covariance:
        case OutputCovariance.DIAGONAL:
            return _variance(feature_pass, blocks, features)
        case OutputCovariance.PER_SAMPLE:
            return _covariance(feature_pass, blocks, features)
        case OutputCovariance.JOINT:
            return _joint_covariance(feature_pass, blocks, features)


def _output_scales(blocks: NamedBlocks, name: str, features: Tensor) -> Tensor:
    """Σ_j (φᵀ u_A,j)² / τ_ij [m, I], one entry for all directions outside of a thin side."""
    squares = sides.energies(features, blocks.input_basis(name))
    return squares @ blocks.table(name).reciprocal().T


def _turned_back(basis: Tensor, scales: Tensor) -> Tensor:
    """U diag(s) Uᵀ [..., C, C] of s [..., I]."""
    if sides.is_thin(basis):
        scales = sides.spread(scales, basis)
        identity = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
        basis = sides.coordinates(identity, basis)
    return (basis * scales.unsqueeze(-2)) @ basis.T


def _variance(feature_pass: FeaturePass, blocks: NamedBlocks, features: Tensor) -> Tensor:
    head = feature_pass.head
    total = features.new_zeros(())
    if head.weight is not None:
        scale = _output_scales(blocks, head.weight, features)
        total = total + scale @ sides.entry_squares(blocks.output_basis(head.weight)).T
    if head.bias is not None:
        basis = blocks.output_basis(head.bias)
        total = total + sides.entry_squares(basis) @ blocks.table(head.bias).reciprocal()
    return total.expand(len(features), -1)


def _bias_covariance(feature_pass: FeaturePass, blocks: NamedBlocks) -> Tensor | None:
    bias = feature_pass.head.bias
    if bias is None:
        return None
    return _turned_back(blocks.output_basis(bias), blocks.table(bias).reciprocal())


def _covariance(feature_pass: FeaturePass, blocks: NamedBlocks, features: Tensor) -> Tensor:
    head = feature_pass.head
    bias = _bias_covariance(feature_pass, blocks)
    if head.weight is None:
        assert bias is not None
        return bias.expand(len(features), -1, -1)
    scale = _output_scales(blocks, head.weight, features)
    weight = _turned_back(blocks.output_basis(head.weight), scale)
    return weight if bias is None else weight + bias


def _joint_covariance(feature_pass: FeaturePass, blocks: NamedBlocks, features: Tensor) -> Tensor:
    """[m·C, m·C]: the closed form with products φ̃_n,j φ̃_n',j in place of squares."""
    head = feature_pass.head
    m = len(features)
    bias = _bias_covariance(feature_pass, blocks)
    if head.weight is None:
        assert bias is not None
        return bias.repeat(m, m)
    inputs, basis = blocks.input_basis(head.weight), blocks.output_basis(head.weight)
    n_outputs = len(basis)
    rotated = sides.coordinates(features, inputs)
    table = sides.spread(blocks.table(head.weight).reciprocal(), inputs)
    scale = torch.einsum("nj,kj,ij->nki", rotated, rotated, table)
    joint = _turned_back(basis, scale).transpose(1, 2)
    if bias is not None:
        joint = joint + bias.reshape(1, n_outputs, 1, n_outputs)
    return joint.reshape(m * n_outputs, m * n_outputs)
