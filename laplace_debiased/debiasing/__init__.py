"""The schemes: which data give directions, which magnitudes, and how folds are joined."""

from laplace_debiased.debiasing.bases import (
    eigenbases,
    eigenbasis,
    kfac_magnitudes,
    own_magnitudes,
)
from laplace_debiased.debiasing.bias import BiasReport, Comparison, bias_report, compared
from laplace_debiased.debiasing.joining import join_by_rank
from laplace_debiased.debiasing.schemes import Measurement, SchemePlan, scheme_plan

__all__ = [
    "BiasReport",
    "Comparison",
    "Measurement",
    "SchemePlan",
    "bias_report",
    "compared",
    "eigenbases",
    "eigenbasis",
    "join_by_rank",
    "kfac_magnitudes",
    "own_magnitudes",
    "scheme_plan",
]
