"""Second-order steps from two mini-batches: debiased conjugate gradients and a Newton optimiser."""

from laplace_debiased.optim.cg import (
    CGResult,
    NonPositiveCurvature,
    StopReason,
    Termination,
    debiased_cg,
)
from laplace_debiased.optim.model_quadratic import model_quadratic
from laplace_debiased.optim.newton_cg import MiniBatches, NewtonCG, StepReport
from laplace_debiased.optim.quadratic import Quadratic
from laplace_debiased.options import Curvature

__all__ = [
    "CGResult",
    "Curvature",
    "MiniBatches",
    "NewtonCG",
    "NonPositiveCurvature",
    "Quadratic",
    "StepReport",
    "StopReason",
    "Termination",
    "debiased_cg",
    "model_quadratic",
]
