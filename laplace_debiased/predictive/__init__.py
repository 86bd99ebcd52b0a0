"""Moments of the linearised network's outputs, without Jacobians; probabilities from them."""

from laplace_debiased.predictive.kron import KronPredictor
from laplace_debiased.predictive.last_layer import LastLayerKronPredictor
from laplace_debiased.predictive.lowrank import LowRankPredictor
from laplace_debiased.predictive.predictor import OutputCovariance, Predictor
from laplace_debiased.predictive.probabilities import OutputsReport, Predictive, outputs_report
from laplace_debiased.predictive.selection import OutputSelection, resolved

__all__ = [
    "KronPredictor",
    "LastLayerKronPredictor",
    "LowRankPredictor",
    "OutputCovariance",
    "OutputSelection",
    "OutputsReport",
    "Predictive",
    "Predictor",
    "outputs_report",
    "resolved",
]
