"""The posteriors: subclasses of laplace-torch's with debiased curvature."""

from laplace_debiased.posterior.kron import DebiasedKronLaplace
from laplace_debiased.posterior.last_layer import DebiasedKronLLLaplace, DebiasedLowRankLLLaplace
from laplace_debiased.posterior.lowrank import DebiasedLowRankLaplace

__all__ = [
    "DebiasedKronLLLaplace",
    "DebiasedKronLaplace",
    "DebiasedLowRankLLLaplace",
    "DebiasedLowRankLaplace",
]
