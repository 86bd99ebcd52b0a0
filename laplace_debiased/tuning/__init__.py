"""The choice of prior precision and link, by validation data or the marginal likelihood."""

from laplace_debiased.tuning.grid import PriorGrid
from laplace_debiased.tuning.result import TuningResult
from laplace_debiased.tuning.search import GridSearch
from laplace_debiased.tuning.validation import Subject, Validation

__all__ = ["GridSearch", "PriorGrid", "Subject", "TuningResult", "Validation"]
