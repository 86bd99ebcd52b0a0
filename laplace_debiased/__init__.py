"""Calibrated uncertainty from a small curvature budget, as a plugin for laplace-torch.

Debiased conjugate gradients and ``NewtonCG`` are in ``laplace_debiased.optim``.
"""

from laplace_debiased._version import __version__
from laplace_debiased.calibration import (
    Comparison,
    Evaluation,
    TemperatureScaling,
    compare,
    evaluate,
    fit_temperature,
)
from laplace_debiased.data.next_token import NextTokenLabels
from laplace_debiased.diagnostics import DirectionalProfile, directional_profile
from laplace_debiased.errors import (
    CoverageError,
    ModelCallError,
    ModelChangedError,
    NotFittedError,
    NumericalError,
    StoredFileError,
)
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.options import (
    Fisher,
    HessianStructure,
    Magnitudes,
    Sampling,
    Scheme,
    SubsetOfWeights,
)
from laplace_debiased.posterior import (
    DebiasedKronLaplace,
    DebiasedKronLLLaplace,
    DebiasedLowRankLaplace,
    DebiasedLowRankLLLaplace,
)

__all__ = [
    "Comparison",
    "CoverageError",
    "DebiasedKronLLLaplace",
    "DebiasedKronLaplace",
    "DebiasedLaplace",
    "DebiasedLowRankLLLaplace",
    "DebiasedLowRankLaplace",
    "DirectionalProfile",
    "Evaluation",
    "Fisher",
    "HessianStructure",
    "Magnitudes",
    "ModelCallError",
    "ModelChangedError",
    "NextTokenLabels",
    "NotFittedError",
    "NumericalError",
    "Sampling",
    "Scheme",
    "StoredFileError",
    "SubsetOfWeights",
    "TemperatureScaling",
    "__version__",
    "compare",
    "directional_profile",
    "evaluate",
    "fit_temperature",
]
