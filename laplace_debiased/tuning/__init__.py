"""The choice of the prior precision, from validation data or the marginal likelihood."""

from laplace_debiased.tuning.grid import GridSearch, PriorGrid
from laplace_debiased.tuning.marglik import maximise_marginal_likelihood
from laplace_debiased.tuning.result import TuningResult
from laplace_debiased.tuning.subject import Subject

__all__ = ["GridSearch", "PriorGrid", "Subject", "TuningResult", "maximise_marginal_likelihood"]
