"""How good and how calibrated predictions are: metrics, reliability plots, a scaling baseline."""

from laplace_debiased.calibration.evaluation import Evaluation, evaluate
from laplace_debiased.calibration.reliability import IntervalCurve, ReliabilityBins
from laplace_debiased.calibration.report import PredictiveReport, predictive_report
from laplace_debiased.calibration.temperature import (
    TemperatureScaling,
    collect_logits,
    fit_temperature,
)

__all__ = [
    "Evaluation",
    "IntervalCurve",
    "PredictiveReport",
    "ReliabilityBins",
    "TemperatureScaling",
    "collect_logits",
    "evaluate",
    "fit_temperature",
    "predictive_report",
]
