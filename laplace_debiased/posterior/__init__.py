"""The posteriors: subclasses of laplace-torch's with debiased curvature."""

from laplace_debiased.posterior.kron import DebiasedKronLaplace

__all__ = ["DebiasedKronLaplace"]
