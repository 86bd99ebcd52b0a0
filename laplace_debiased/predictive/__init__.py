"""Covariance of the linearised network's outputs, without Jacobians."""

from laplace_debiased.predictive.functional import (
    NamedBlocks,
    OutputCovariance,
    functional_moments,
)
from laplace_debiased.predictive.interpolation import CovarianceCurve
from laplace_debiased.predictive.last_layer import last_layer_moments
from laplace_debiased.predictive.sweep import last_layer_sweep, prior_sweep

__all__ = [
    "CovarianceCurve",
    "NamedBlocks",
    "OutputCovariance",
    "functional_moments",
    "last_layer_moments",
    "last_layer_sweep",
    "prior_sweep",
]
