"""How good and how calibrated predictions are: metrics, reliability plots, a scaling baseline."""

from laplace_debiased.calibration.comparing import compare
from laplace_debiased.calibration.comparison import ComparedRow, Comparison
from laplace_debiased.calibration.evaluation import (
    Evaluation,
    evaluate,
)
from laplace_debiased.calibration.reliability import IntervalCurve, ReliabilityBins
from laplace_debiased.calibration.temperature import (
    TemperatureScaling,
    collect_logits,
    fit_temperature,
)

__all__ = [
    "ComparedRow",
    "Comparison",
    "Evaluation",
    "IntervalCurve",
    "ReliabilityBins",
    "TemperatureScaling",
    "collect_logits",
    "compare",
    "evaluate",
    "fit_temperature",
]
