"""Validation losses for tuning: one fresh scorer per prior precision."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.likelihoods import LikelihoodName

Prediction = tuple[Tensor, ...]
"""(probabilities [m, C],) in classification; (mean [m, C], variance) in regression."""


class Scorer(ABC):
    """A running validation loss."""

    @abstractmethod
    def update(self, prediction: Prediction, targets: Tensor) -> None:
        """Add a batch."""

    @abstractmethod
    def value(self) -> float:
        """The loss over all batches."""

    def state(self) -> Any:
        """What the batches so far come to, for other ranks: plain values and CPU tensors."""
        raise NotImplementedError

    def add(self, state: Any) -> None:
        """Add another's :meth:`state`."""
        raise NotImplementedError


class MeanScorer(Scorer):
    """The mean of a loss of every sample [m]."""

    def __init__(self, losses: Callable[[Prediction, Tensor], Tensor]) -> None:
        self._losses, self._sum, self._count = losses, 0.0, 0

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        self.add((float(self._losses(prediction, targets).sum()), len(targets)))

    def value(self) -> float:
        return self._sum / self._count if self._count else math.nan

    def state(self) -> tuple[float, int]:
        return self._sum, self._count

    def add(self, state: tuple[float, int]) -> None:
        self._sum, self._count = self._sum + state[0], self._count + state[1]


def categorical_nll(prediction: Prediction, targets: Tensor) -> Tensor:
    """Negative log probability of the label [m], in nats."""
    return -prediction[0].gather(-1, targets.unsqueeze(-1)).squeeze(-1).double().log()


def binary_nll(prediction: Prediction, targets: Tensor) -> Tensor:
    """Negative log probability of all binary labels of a sample [m], in nats."""
    p = prediction[0].double()
    y = targets.reshape(p.shape).double()
    # xlogy: a label of probability zero that does not occur costs nothing.
    return -(torch.xlogy(y, p) + torch.xlogy(1 - y, 1 - p)).sum(-1)


def gaussian_nll(prediction: Prediction, targets: Tensor, noise_variance: float) -> Tensor:
    """−log N(y | f, var + σ²) [m], summed over outputs, in nats; var is epistemic only.

    The variance is [m, C] or a covariance [m, C, C].
    """
    mean, variance = prediction
    if variance.ndim == 3:
        variance = variance.diagonal(dim1=-2, dim2=-1)
    total = variance.double() + noise_variance
    squares = (targets.double() - mean.double()).square()
    return 0.5 * (squares / total + (2 * math.pi * total).log()).sum(-1)


class MetricScorer(Scorer):
    """A torchmetrics metric, cloned and reset; vector-valued metrics are summed.

    It holds no batches; those of several ranks are put together by a :class:`KeepingScorer`.
    """

    def __init__(self, metric: torchmetrics.Metric) -> None:
        self._metric = metric.clone()
        self._metric.reset()
        # Of itself it would gather what other ranks have: these have the same here, or their part.
        self._metric.sync_on_compute = False

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        try:
            self._metric.update(*prediction, targets)
        except TypeError:  # a metric that takes no variance
            self._metric.update(prediction[0], targets)

    def value(self) -> float:
        value = self._metric.compute()
        return as_number(value.sum() if isinstance(value, Tensor) else value)


class KeepingScorer(Scorer):
    """A function of all batches, called once at the end."""

    def __init__(self, function: Callable[[list[Prediction]], float]) -> None:
        self._function = function
        self._parts: list[Prediction] = []

    def update(self, prediction: Prediction, targets: Tensor) -> None:
        self._parts.append((*prediction, targets))

    def value(self) -> float:
        return self._function(self._parts)

    def state(self) -> list[Prediction]:
        return [tuple(tensor.cpu() for tensor in part) for part in self._parts]

    def add(self, state: list[Prediction]) -> None:
        self._parts += state


def _of_everything(function: Callable[..., Tensor | float], parts: list[Prediction]) -> float:
    return as_number(function(*(torch.cat(part) for part in zip(*parts, strict=True))))


def _of_metric(metric: torchmetrics.Metric, parts: list[Prediction]) -> float:
    scorer = MetricScorer(metric)
    for part in parts:
        *prediction, targets = (tensor.to(metric.device) for tensor in part)
        scorer.update(tuple(prediction), targets)
    return scorer.value()


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
    is_part: bool = False,
) -> Callable[[], Scorer]:
    """Makes a fresh scorer for every prior precision.

    Args:
        loss: the user's own, or None for the negative log likelihood.
        likelihood: a :class:`LikelihoodName`'s value.
        noise_variance: σ².
        is_part: whether a scorer sees a part of the batches, and is added to others.

    Raises:
        TypeError: if ``loss`` is neither a metric, nor callable, nor None.
        ValueError: if it is a metric that is to be maximised.
    """
    if isinstance(loss, type):
        raise TypeError(f"loss is the class {loss.__name__}; pass an instance, {loss.__name__}().")
    match loss:
        case None if likelihood == LikelihoodName.REGRESSION:
            return lambda: MeanScorer(partial(gaussian_nll, noise_variance=noise_variance))
        case None if likelihood == LikelihoodName.BERNOULLI:
            return lambda: MeanScorer(binary_nll)
        case None:
            return lambda: MeanScorer(categorical_nll)
        case torchmetrics.Metric(higher_is_better=True):
            raise ValueError(
                f"loss={type(loss).__name__} is better the higher it is, but the grid search "
                "minimises: pass a loss, or a function such as lambda probs, y: -metric(probs, y)."
            )
        case torchmetrics.Metric():
            if is_part:
                return lambda: KeepingScorer(partial(_of_metric, loss))
            return lambda: MetricScorer(loss)
        case _ if callable(loss):
            known = _given_what_it_takes(loss, likelihood)
            return lambda: KeepingScorer(partial(_of_everything, known))
    raise TypeError(f"loss must be a torchmetrics.Metric or a callable; got {type(loss).__name__}.")


_OF_LOGITS = (
    nn.CrossEntropyLoss,
    nn.NLLLoss,
    nn.BCEWithLogitsLoss,
    functional.cross_entropy,
    functional.nll_loss,
    functional.binary_cross_entropy_with_logits,
)
"""Losses of torch that do not take the probabilities that a prediction gives."""


def _given_what_it_takes(loss: Callable[..., Any], likelihood: str) -> Callable[..., Any]:
    """A function of a prediction and its targets; without the variance where it takes none.

    Raises:
        TypeError: if it takes neither what a prediction and its targets are, nor less.
        ValueError: if it is known to take logits.
    """
    gaussian = likelihood == LikelihoodName.REGRESSION
    if not gaussian and (type(loss) in _OF_LOGITS or loss in _OF_LOGITS):
        name = getattr(loss, "__name__", type(loss).__name__)
        raise ValueError(
            f"loss={name} takes logits or their logarithms, but is given probabilities: leave "
            "loss out for their negative log likelihood, or pass a function (probs, targets) -> "
            "number."
        )
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # of C, say
        return loss
    if _can_call(signature, 3 if gaussian else 2):
        return loss
    if gaussian and _can_call(signature, 2):
        return lambda mean, _, targets: loss(mean, targets)
    wanted = "(mean, variance, targets) or (mean, targets)" if gaussian else "(probs, targets)"
    raise TypeError(f"loss must be a function {wanted} -> number; it takes {signature}.")


def _can_call(signature: inspect.Signature, n_arguments: int) -> bool:
    try:
        signature.bind(*[None] * n_arguments)
    except TypeError:
        return False
    return True
