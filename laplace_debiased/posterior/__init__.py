"""The posteriors: subclasses of laplace-torch's with debiased curvature."""

from laplace_debiased.posterior.kron import DebiasedKronLaplace
from laplace_debiased.posterior.last_layer import DebiasedKronLLLaplace
from laplace_debiased.posterior.lowrank import DebiasedLowRankLaplace
from laplace_debiased.posterior.lowrank_last_layer import DebiasedLowRankLLLaplace

__all__ = [
    "DebiasedKronLLLaplace",
    "DebiasedKronLaplace",
    "DebiasedLowRankLLLaplace",
    "DebiasedLowRankLaplace",
]
