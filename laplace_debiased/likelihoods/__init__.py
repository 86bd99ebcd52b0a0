"""Loss-Hessian roots and their traces, and the links from outputs to probabilities."""

from laplace_debiased.likelihoods.categorical import SoftmaxCrossEntropy
from laplace_debiased.likelihoods.integrals import InverseLink, mutual_information, softmax
from laplace_debiased.likelihoods.links import (
    gaussian_samples,
    laplace_bridge,
    monte_carlo,
    probit,
)
from laplace_debiased.likelihoods.losses import LikelihoodName, LossModel, residual_noise
from laplace_debiased.likelihoods.models import curvature_columns, loss_model, sketched_columns
from laplace_debiased.likelihoods.tail import ChosenMoments

__all__ = [
    "ChosenMoments",
    "InverseLink",
    "LikelihoodName",
    "LossModel",
    "SoftmaxCrossEntropy",
    "curvature_columns",
    "gaussian_samples",
    "laplace_bridge",
    "loss_model",
    "monte_carlo",
    "mutual_information",
    "probit",
    "residual_noise",
    "sketched_columns",
    "softmax",
]
