"""From a posterior or precomputed predictions, and a loader, to validated arrays."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from laplace_debiased.calibration import checks, metrics
from laplace_debiased.calibration.batches import (
    FloatArray,
    IntArray,
    Targets,
    collect_targets,
    concatenate,
    inputs_only,
    iterate,
    split_batch,
    to_device,
    to_numpy,
)
from laplace_debiased.calibration.state import untouched

Values = torch.Tensor | np.ndarray
Call = Callable[[Any], Any]


@dataclass(frozen=True)
class ClassPredictions:
    """Predictions of a classifier.

    Attributes:
        probs: Predictive probabilities [n, C].
        labels: Class indices [n].
        floor: What a probability of zero stands for in a logarithm.
    """

    probs: FloatArray
    labels: IntArray
    floor: float


@dataclass(frozen=True)
class GaussianPredictions:
    """Predictions of a regression model.

    Attributes:
        mean: Predictive means [n, K].
        targets: Targets [n, K].
        total_variance: Variances of a new observation, noise included [n, K].
        epistemic_variance: The part due to the weights [n, K]; None where it is not known.
        nll: Negative log density of each target vector [n], in nats.
    """

    mean: FloatArray
    targets: FloatArray
    total_variance: FloatArray
    epistemic_variance: FloatArray | None
    nll: FloatArray


@dataclass(frozen=True)
class Options:
    """How a posterior is asked; None leaves the posterior's own default.

    Attributes:
        link_approx: Link approximation; by default the one that the posterior was tuned for.
        pred_type: Type of predictive.
        progress_bar: Whether to show progress over the loader.
    """

    link_approx: str | None = None
    pred_type: str | None = None
    progress_bar: bool = False


def predict(
    source: Any, loader: Targets, options: Options
) -> ClassPredictions | GaussianPredictions:
    """Predictions for a loader, beside its targets.

    Args:
        source: A fitted posterior, probabilities [n, C], or a pair of means [n, K] and total
            predictive variances ([n, K], or covariances [n, K, K]).
        loader: Gives (x, y) or mappings; for precomputed predictions unshuffled, or the targets.
        options: How a posterior is asked.

    Raises:
        TypeError: If `source` is none of these.
        ValueError: If predictions or targets are invalid or do not match.
    """
    if isinstance(source, Values):
        with untouched(None):
            targets = collect_targets(loader)
        return _class_predictions(source, targets)
    if isinstance(source, tuple):
        with untouched(None):
            targets = collect_targets(loader)
        return _from_moments(source, targets)
    likelihood = _likelihood(source)
    ask = _ask(source, likelihood, options)
    with untouched(_model(source)):
        if likelihood == "classification":
            return _classify(source, ask, loader, options)
        return _regress(source, ask, loader, options)


def predict_unlabelled(source: Any, loader: Iterable[Any], options: Options) -> FloatArray:
    """Class probabilities [n, C] of a posterior for a loader whose targets do not matter."""
    ask = _ask(source, _likelihood(source), options)
    device = getattr(source, "_device", None)
    with untouched(_model(source)):
        parts = [
            _detached(ask(to_device(inputs_only(batch), device)))
            for batch in iterate(loader, "ood_loader", options.progress_bar)
        ]
    return checks.probabilities(torch.cat(parts), "out-of-distribution probabilities")


def _classify(la: Any, ask: Call, loader: Targets, options: Options) -> ClassPredictions:
    key, device = getattr(la, "dict_key_y", "labels"), getattr(la, "_device", None)
    probs, labels = [], []
    for batch in iterate(loader, "loader", options.progress_bar):
        x, y = split_batch(batch, key)
        probs.append(_detached(ask(to_device(x, device))))
        labels.append(to_numpy(torch.as_tensor(y)))
    return _class_predictions(torch.cat(probs), concatenate(labels))


def _regress(la: Any, ask: Call, loader: Targets, options: Options) -> GaussianPredictions:
    key, device = getattr(la, "dict_key_y", "labels"), getattr(la, "_device", None)
    noise = np.square(np.atleast_1d(to_numpy(torch.as_tensor(la.sigma_noise)).astype(np.float64)))
    parts = []
    for batch in iterate(loader, "loader", options.progress_bar):
        x, y = split_batch(batch, key)
        mean, variance = (_detached(part) for part in ask(to_device(x, device)))
        targets = to_numpy(torch.as_tensor(y))
        # Batch by batch: only the diagonals of n K×K covariances are worth keeping.
        parts.append(_gaussian_predictions(mean, variance, targets, noise))
    return _joined(parts)


def _class_predictions(probs: Values, targets: np.ndarray) -> ClassPredictions:
    checked = checks.probabilities(probs)
    labels = checks.class_labels(targets, *checked.shape)
    return ClassPredictions(checked, labels, checks.smallest_probability(probs))


def _from_moments(source: tuple[Any, ...], targets: np.ndarray) -> GaussianPredictions:
    if len(source) != 2 or not all(isinstance(part, Values) for part in source):
        raise TypeError(
            "la_or_probs as a tuple must be (mean, variance) tensors, got "
            f"({', '.join(type(part).__name__ for part in source)})."
        )
    return _gaussian_predictions(*source, targets, noise=None)


def _gaussian_predictions(
    mean: Values, variance: Values, targets: np.ndarray, noise: FloatArray | None
) -> GaussianPredictions:
    """Predictions with observation noise variance [1] or [K] added; None: it is in there."""
    mu, covariance = _moments(mean, variance)
    y = checks.regression_targets(targets, mu.shape)
    added = np.zeros(1) if noise is None else noise
    if len(added) not in (1, mu.shape[1]):
        raise ValueError(
            f"sigma_noise must have one entry or one per output ({mu.shape[1]}), got {len(added)}."
        )
    epistemic = covariance if covariance.ndim == 2 else np.diagonal(covariance, axis1=1, axis2=2)
    total = epistemic + added
    row = checks.first_bad_row((epistemic >= 0.0) & (total > 0.0))
    if row is not None:
        raise ValueError(
            f"variance must be positive, got {epistemic[row]} in row {row} with observation noise "
            f"variance {added}; check prior_precision and sigma_noise."
        )
    full = total if covariance.ndim == 2 else covariance + np.eye(mu.shape[1]) * added
    try:
        nll = metrics.gaussian_nll(y - mu, full)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            "variance must be positive definite for each sample with the observation noise added; "
            "pass variances (samples, outputs), or check prior_precision and sigma_noise."
        ) from error
    return GaussianPredictions(mu, y, total, None if noise is None else epistemic, nll)


def _moments(mean: Values, variance: Values) -> tuple[FloatArray, FloatArray]:
    """Means [n, K] and variances [n, K] or covariances [n, K, K] in float64."""
    mu, covariance = checks.finite(mean, "mean"), checks.finite(variance, "variance")
    mu = mu[:, None] if mu.ndim == 1 else mu
    covariance = covariance[:, None] if covariance.ndim == 1 else covariance
    if mu.ndim != 2 or covariance.shape not in (mu.shape, (*mu.shape, mu.shape[-1])):
        raise ValueError(
            "variance must have the shape of mean (samples, outputs), or that of its covariance "
            f"(samples, outputs, outputs), got mean {mu.shape} and variance {covariance.shape}."
        )
    return mu, covariance


def _joined(parts: list[GaussianPredictions]) -> GaussianPredictions:
    epistemic = [p.epistemic_variance for p in parts if p.epistemic_variance is not None]
    return GaussianPredictions(
        mean=np.concatenate([p.mean for p in parts]),
        targets=np.concatenate([p.targets for p in parts]),
        total_variance=np.concatenate([p.total_variance for p in parts]),
        epistemic_variance=np.concatenate(epistemic) if epistemic else None,
        nll=np.concatenate([p.nll for p in parts]),
    )


def _likelihood(source: Any) -> str:
    """The posterior's likelihood by name.

    Raises:
        TypeError: If `source` is no posterior.
        ValueError: If its likelihood cannot be scored.
    """
    likelihood = getattr(source, "likelihood", None)
    if isinstance(source, nn.Module) or not callable(source) or likelihood is None:
        raise TypeError(
            "la_or_probs must be a fitted posterior, class probabilities (samples, classes), or a "
            f"(mean, variance) pair, got {type(source).__name__}; for a plain model pass "
            "torch.softmax(logits, -1)."
        )
    name = str(getattr(likelihood, "value", likelihood))
    if name not in ("classification", "regression"):
        raise ValueError(
            f"likelihood must be 'classification' or 'regression' to be evaluated, got {name!r}; "
            "pass probabilities instead."
        )
    return name


def _ask(la: Any, likelihood: str, options: Options) -> Call:
    """The posterior's predictive under the options."""
    kwargs = {} if options.pred_type is None else {"pred_type": options.pred_type}
    if likelihood == "classification":
        link = options.link_approx
        if link is None:
            # Sampling weights leaves no other link; a link tuned for "glm" does not apply.
            sampled = options.pred_type == "nn"
            link = "mc" if sampled else getattr(la, "tuned_link_approx", None)
        if link is not None:
            kwargs["link_approx"] = link
    elif options.link_approx is not None:
        raise ValueError("link_approx applies to classification; leave it out for regression.")
    return lambda x: la(x, **kwargs)


def _model(la: Any) -> nn.Module | None:
    model = getattr(la, "model", None)
    return model if isinstance(model, nn.Module) else None


def _detached(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().cpu()
