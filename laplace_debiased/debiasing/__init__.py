"""The schemes: which data give directions, which magnitudes, and how folds are joined."""

from laplace_debiased.debiasing.bases import (
    eigenbasis,
    join_by_rank,
    kfac_magnitudes,
    own_magnitudes,
)
from laplace_debiased.debiasing.schemes import Measurement, SchemePlan, scheme_plan

__all__ = [
    "Measurement",
    "SchemePlan",
    "eigenbasis",
    "join_by_rank",
    "kfac_magnitudes",
    "own_magnitudes",
    "scheme_plan",
]
