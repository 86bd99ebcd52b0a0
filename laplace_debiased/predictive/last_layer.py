r"""The last-layer predictive in closed form: features in, no Jacobian.

With features φ of an input and a weight block of precision table τ [C, D],

    Cov[f] = U_B diag_i(Σ_j (φᵀ u_A,j)² / τ_ij) U_Bᵀ + U_b diag(1/τ_b) U_bᵀ,

and with thin sides the same in their coordinates (:mod:`laplace_debiased.curvature.rows.sides`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.curvature.rows import sides
from laplace_debiased.operators import EigenKron
from laplace_debiased.predictive.functional import NamedBlocks
from laplace_debiased.predictive.predictor import OutputCovariance, Sweep


@dataclass(frozen=True, eq=False)
class LastLayerKronPredictor:
    """A Kronecker curvature of the last layer with the network that it belongs to.

    Attributes:
        engine: the pass that gives features.
        names: covered parameters, in the order of the blocks.
        curvature: N·λ in its eigenbasis (a sum over the training set).
    """

    engine: FeaturePass
    names: tuple[str, ...]
    curvature: EigenKron

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs f [m, C], without a graph."""
        return self.engine.outputs(inputs)

    def precision(self, h: Tensor, prior: Tensor) -> EigenKron:
        """h·N·λ + δ, per block."""
        return self.curvature * h + prior

    def moments(
        self,
        inputs: Any,
        precision: EigenKron,
        covariance: OutputCovariance,
        *,
        differentiable: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the outputs: see ``Predictor``."""
        outputs, features = self.engine.features(inputs, differentiable=differentiable)
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            if not differentiable:
                outputs, features = outputs.detach(), features.detach()
            blocks = NamedBlocks(self.names, precision)
            return outputs, covariance_of_features(self.engine, blocks, features, covariance)

    def sweep(self, inputs: Any, h: Tensor, priors: Tensor, *, diagonal: bool) -> Sweep:
        """Moments under a grid of priors: see ``Predictor``."""
        kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
        with torch.no_grad():
            outputs, features = self.engine.features(inputs)
            scaled = self.curvature * h
            unit = torch.ones((), dtype=scaled.dtype, device=scaled.device)
            covariances = [
                covariance_of_features(
                    self.engine, NamedBlocks(self.names, operator), features, kind
                )
                for operator in (*(scaled + prior for prior in priors), scaled * 0.0 + unit)
            ]
        return Sweep(outputs.detach(), torch.stack(covariances[:-1]), covariances[-1])


def covariance_of_features(
    feature_pass: FeaturePass, blocks: NamedBlocks, features: Tensor, covariance: OutputCovariance
) -> Tensor:
    """Covariance of the outputs that belong to the features φ [m, D]."""
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
    layer = feature_pass.layer
    total = features.new_zeros(())
    if layer.weight is not None:
        scale = _output_scales(blocks, layer.weight, features)
        total = total + scale @ sides.entry_squares(blocks.output_basis(layer.weight)).T
    if layer.bias is not None:
        basis = blocks.output_basis(layer.bias)
        total = total + sides.entry_squares(basis) @ blocks.table(layer.bias).reciprocal()
    return total.expand(len(features), -1)


def _bias_covariance(feature_pass: FeaturePass, blocks: NamedBlocks) -> Tensor | None:
    bias = feature_pass.layer.bias
    if bias is None:
        return None
    return _turned_back(blocks.output_basis(bias), blocks.table(bias).reciprocal())


def _covariance(feature_pass: FeaturePass, blocks: NamedBlocks, features: Tensor) -> Tensor:
    layer = feature_pass.layer
    bias = _bias_covariance(feature_pass, blocks)
    if layer.weight is None:
        assert bias is not None
        return bias.expand(len(features), -1, -1)
    scale = _output_scales(blocks, layer.weight, features)
    weight = _turned_back(blocks.output_basis(layer.weight), scale)
    return weight if bias is None else weight + bias


def _joint_covariance(feature_pass: FeaturePass, blocks: NamedBlocks, features: Tensor) -> Tensor:
    """[m·C, m·C]: the closed form with products φ̃_n,j φ̃_n',j in place of squares."""
    layer = feature_pass.layer
    m = len(features)
    bias = _bias_covariance(feature_pass, blocks)
    if layer.weight is None:
        assert bias is not None
        return bias.repeat(m, m)
    inputs, basis = blocks.input_basis(layer.weight), blocks.output_basis(layer.weight)
    n_outputs = len(basis)
    rotated = sides.coordinates(features, inputs)
    table = sides.spread(blocks.table(layer.weight).reciprocal(), inputs)
    scale = torch.einsum("nj,kj,ij->nki", rotated, rotated, table)
    joint = _turned_back(basis, scale).transpose(1, 2)
    if bias is not None:
        joint = joint + bias.reshape(1, n_outputs, 1, n_outputs)
    return joint.reshape(m * n_outputs, m * n_outputs)
