"""Validation losses for tuning: one fresh scorer per prior precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Protocol

import torch
import torchmetrics
from torch import Tensor

from laplace_debiased.likelihoods import LikelihoodName

Prediction = tuple[Tensor, ...]
"""(probabilities [m, C],) in classification; (mean [m, C], variance) in regression."""


class Scorer(Protocol):
    """A running validation loss."""

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        """Add a batch."""

    def value(self) -> float:
        """The loss over all batches."""


class CategoricalNLL:
    """Mean negative log probability of the label, in nats."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        """Add a batch."""
        chosen = prediction[0].gather(-1, targets.unsqueeze(-1)).double()
        self._sum -= float(chosen.log().sum())
        self._count += len(targets)

    def value(self) -> float:
        """The mean so far."""
        return self._sum / self._count if self._count else math.nan


class BinaryNLL:
    """Mean over samples of the negative log probability of all their binary labels, in nats."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        """Add a batch."""
        p = prediction[0].double()
        y = targets.reshape(p.shape).double()
        # xlogy: a label of probability zero that does not occur costs nothing.
        self._sum -= float((torch.xlogy(y, p) + torch.xlogy(1 - y, 1 - p)).sum())
        self._count += len(targets)

    def value(self) -> float:
        """The mean so far."""
        return self._sum / self._count if self._count else math.nan


class GaussianNLL:
    """Mean over samples of −log N(y | f, var + σ²), summed over outputs, in nats.

    Args:
        noise_variance: σ²; the prediction's variance is epistemic only.
    """

    def __init__(self, noise_variance: float) -> None:
        self._noise = noise_variance
        self._sum, self._count = 0.0, 0

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        """Add a batch; the variance is [m, C] or a covariance [m, C, C]."""
        mean, variance = prediction
        if variance.ndim == 3:
            variance = variance.diagonal(dim1=-2, dim2=-1)
        total = variance.double() + self._noise
        squares = (targets.double() - mean.double()).square()
        self._sum += float(0.5 * (squares / total + (2 * math.pi * total).log()).sum())
        self._count += len(targets)

    def value(self) -> float:
        """The mean so far."""
        return self._sum / self._count if self._count else math.nan


class MetricScorer:
    """A torchmetrics metric, cloned and reset; vector-valued metrics are summed."""

    def __init__(self, metric: torchmetrics.Metric) -> None:
        self._metric = metric.clone()
        self._metric.reset()

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        """Add a batch; metrics that take no variance get the mean only."""
        try:
            self._metric.update(*prediction, targets)
        except TypeError:
            self._metric.update(prediction[0], targets)

    def value(self) -> float:
        """The metric so far."""
        value = self._metric.compute()
        return as_number(value.sum() if isinstance(value, Tensor) else value)


class CallableScorer:
    """A function of all predictions and targets, called once at the end."""

    def __init__(self, function: Callable[..., Tensor | float]) -> None:
        self._function = function
        self._parts: list[tuple[Tensor, ...]] = []

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        """Keep a batch."""
        self._parts.append((*prediction, targets))

    def value(self) -> float:
        """The function of everything."""
        parts = (torch.cat(part) for part in zip(*self._parts, strict=True))
        return as_number(self._function(*parts))


def as_number(value: object) -> float:
    """A loss as a float.

    Raises:
        TypeError: if it is no single real number.
    """
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    # A string converts to a float too, but is no loss; numpy's scalars are real numbers.
    if isinstance(value, Real):
        return float(value)
    got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"loss must return one real number for the validation set; got {got}.")


def scorer_factory(
    loss: torchmetrics.Metric | Callable[..., Tensor | float] | None,
    likelihood: str,
    *,
    noise_variance: float,
) -> Callable[[], Scorer]:
    """Makes a fresh scorer for every prior precision.

    Raises:
        TypeError: if ``loss`` is neither a metric, nor callable, nor None.
        ValueError: if it is a metric that is to be maximised.
    """
    if isinstance(loss, type):
        raise TypeError(f"loss is the class {loss.__name__}; pass an instance, {loss.__name__}().")
    match loss:
        case None if likelihood == LikelihoodName.REGRESSION:
            return lambda: GaussianNLL(noise_variance)
        case None if likelihood == LikelihoodName.BERNOULLI:
            return BinaryNLL
        case None:
            return CategoricalNLL
        case torchmetrics.Metric(higher_is_better=True):
            raise ValueError(
                f"loss={type(loss).__name__} is better the higher it is, but the grid search "
                "minimises: pass a loss, or a function such as lambda probs, y: -metric(probs, y)."
            )
        case torchmetrics.Metric():
            return lambda: MetricScorer(loss)
        case _ if callable(loss):
            return lambda: CallableScorer(loss)
    raise TypeError(f"loss must be a torchmetrics.Metric or a callable; got {type(loss).__name__}.")
