"""Moments of a posterior's outputs, whatever its structure."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from laplace_debiased.predictive import OutputCovariance


def moments(la: Any, x: Any, kind: OutputCovariance) -> tuple[Tensor, Tensor]:
    """Mean and covariance under the posterior's present hyper-parameters."""
    precision = la.predictor.precision(la._H_factor, la.prior_precision)
    found = la.predictor.moments(x, precision, kind, differentiable=la.enable_backprop)
    return found.mean, found.covariance


def sweep(la: Any, x: Any, priors: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Mean and covariances under a grid of prior precisions."""
    swept = la.predictor.sweep(x, la._H_factor, priors, diagonal=diagonal)
    return swept.outputs, swept.covariances
