"""Predictions of a Kronecker curvature over all weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_debiased.curvature import CurvaturePass
from laplace_debiased.operators import EigenKron
from laplace_debiased.predictive.functional import NamedBlocks, functional_moments
from laplace_debiased.predictive.predictor import OutputCovariance, OutputMoments, Sweep
from laplace_debiased.predictive.selection import ALL_OUTPUTS, OutputSelection
from laplace_debiased.predictive.sweep import prior_sweep


@dataclass(frozen=True, eq=False)
class KronPredictor:
    """A Kronecker curvature with the network that it belongs to.

    Attributes:
        engine: the pass over the network.
        names: covered parameters, in the order of the blocks.
        curvature: N·λ in its eigenbasis (a sum over the training set).
    """

    engine: CurvaturePass
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
        selection: OutputSelection = ALL_OUTPUTS,
        *,
        differentiable: bool = False,
    ) -> OutputMoments:
        """Mean and covariance of the linearised outputs: see ``Predictor``."""
        blocks = NamedBlocks(self.names, precision)
        return functional_moments(
            self.engine, blocks, inputs, covariance, selection, differentiable=differentiable
        )

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
        blocks = NamedBlocks(self.names, self.curvature * h)
        return prior_sweep(self.engine, blocks, priors, inputs, selection, diagonal=diagonal)
