"""Loss-Hessian roots and their traces, and the links from outputs to probabilities."""

from laplace_debiased.likelihoods.links import (
    gaussian_samples,
    laplace_bridge,
    monte_carlo,
    probit,
)
from laplace_debiased.likelihoods.losses import (
    LossModel,
    SoftmaxCrossEntropy,
    UnitGaussian,
    curvature_columns,
    loss_model,
)

__all__ = [
    "LossModel",
    "SoftmaxCrossEntropy",
    "UnitGaussian",
    "curvature_columns",
    "gaussian_samples",
    "laplace_bridge",
    "loss_model",
    "monte_carlo",
    "probit",
]
