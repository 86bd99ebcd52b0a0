"""From a request to a fitted curvature: plan, walk, fit."""

from laplace_debiased.estimation.arguments import Arguments, Backend
from laplace_debiased.estimation.fit import run_fit
from laplace_debiased.estimation.kron import KronStructure, posterior_factors
from laplace_debiased.estimation.lowrank import LowRankStructure
from laplace_debiased.estimation.report import FitReport
from laplace_debiased.estimation.request import FitRequest
from laplace_debiased.estimation.structure import Structure
from laplace_debiased.estimation.target import LastLayer, Target
from laplace_debiased.estimation.values import Fit, KronCurvature

__all__ = [
    "Arguments",
    "Backend",
    "Fit",
    "FitReport",
    "FitRequest",
    "KronCurvature",
    "KronStructure",
    "LastLayer",
    "LowRankStructure",
    "Structure",
    "Target",
    "posterior_factors",
    "run_fit",
]
