"""Predictions beside their targets, as validated arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from laplace_debiased.calibration import metrics
from laplace_debiased.calibration.batches import (
    FloatArray,
    IntArray,
    positions_as_samples,
    to_numpy,
    without_ignored,
)
from laplace_debiased.checks import as_integer

Values = torch.Tensor | np.ndarray
SUM_TOLERANCE = 1e-3
LARGEST_COUNT = 10**6
"""Bins that nobody needs, and that fit in memory."""


@dataclass(frozen=True)
class ClassPredictions:
    """Predictions of a classifier: probabilities [n, C] and class indices [n], one row per label.

    K binary labels per sample are n = K · samples rows of two classes, sample by sample.
    """

    probs: FloatArray
    labels: IntArray
    floor: float  # what a probability of zero stands for in a logarithm
    labels_per_sample: int = 1
    binary: bool = False
    information: FloatArray | None = None  # mutual information of label and weights [samples], nats

    @property
    def entropy(self) -> FloatArray:
        """Predictive entropy [samples], in nats, summed over each sample's labels."""
        return self.summed(metrics.predictive_entropy(self.probs))

    @property
    def nll(self) -> FloatArray:
        """Negative log-likelihood [samples], in nats, summed over each sample's labels."""
        return self.summed(metrics.label_nll(self.probs, self.labels, self.floor))

    def summed(self, rows: FloatArray) -> FloatArray:
        """Values of rows [n] summed over each sample's labels [samples]."""
        return rows.reshape(-1, self.labels_per_sample).sum(axis=1)


@dataclass(frozen=True)
class GaussianPredictions:
    """Predictions of a regression model [n, K], and negative log densities [n] in nats."""

    mean: FloatArray
    targets: FloatArray
    total_variance: FloatArray  # of a new observation, noise included
    epistemic_variance: FloatArray | None  # due to the weights, where that is known
    nll: FloatArray


def rows_of(values: Values, binary: bool, name: str) -> FloatArray:
    """Checked probabilities as rows [n, C]: of each sample, position or binary label."""
    if binary:
        one = label_probabilities(values, name).reshape(-1)
        return np.stack([1.0 - one, one], axis=1)  # [n, K] as rows [n · K, 2] of classes 0 and 1
    if values.ndim == 3:  # Sequences [n, T, C].
        values = values.reshape(-1, values.shape[-1])
    return probabilities(values, name)


def class_rows(
    probs: Values, targets: np.ndarray, likelihood: Any, ignore_index: int | None = None
) -> ClassPredictions:
    """Predictions as rows; positions of sequences and labels that do not count are left out."""
    floor = float(resolution_of(probs).tiny)
    if likelihood_name(likelihood) == "bernoulli":
        rows, n_labels = rows_of(probs, True, "probs"), 1 if probs.ndim == 1 else probs.shape[1]
        labels = binary_labels(targets, (len(probs), n_labels)).reshape(-1)
        return ClassPredictions(rows, labels, floor, n_labels, True)
    probs, targets = positions_as_samples(probs, targets)
    rows, targets = without_ignored(rows_of(probs, False, "probs"), targets, ignore_index)
    return ClassPredictions(rows, class_labels(targets, *rows.shape), floor)


def gaussian_predictions(
    mean: Values, variance: Values, targets: np.ndarray, noise: FloatArray | None
) -> GaussianPredictions:
    """Predictions with observation noise variance [1] or [K] added; None: it is in there."""
    mu, covariance = _moments(mean, variance)
    y = regression_targets(targets, mu.shape)
    added = np.zeros(1) if noise is None else noise
    if len(added) not in (1, mu.shape[1]):
        raise ValueError(
            f"sigma_noise must have one entry or one per output ({mu.shape[1]}), got {len(added)}."
        )
    epistemic = covariance if covariance.ndim == 2 else np.diagonal(covariance, axis1=1, axis2=2)
    total = epistemic + added
    row = first_bad_row((epistemic >= 0.0) & (total > 0.0))
    if row is not None:
        raise ValueError(
            f"variance must be positive, got {epistemic[row]} in row {row} with observation noise "
            f"variance {added}; check prior_precision and sigma_noise."
        )
    full = total if covariance.ndim == 2 else covariance + np.eye(mu.shape[1]) * added
    try:
        nll = metrics.gaussian_nll(y - mu, full)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            "variance must be positive definite for each sample with the observation noise added; "
            "pass variances (samples, outputs), or check prior_precision and sigma_noise."
        ) from error
    return GaussianPredictions(mu, y, total, None if noise is None else epistemic, nll)


def _moments(mean: Values, variance: Values) -> tuple[FloatArray, FloatArray]:
    """Means [n, K] and variances [n, K] or covariances [n, K, K] in float64."""
    mu, covariance = finite(mean, "mean"), finite(variance, "variance")
    mu = mu[:, None] if mu.ndim == 1 else mu
    covariance = covariance[:, None] if covariance.ndim == 1 else covariance
    if mu.ndim != 2 or covariance.shape not in (mu.shape, (*mu.shape, mu.shape[-1])):
        raise ValueError(
            "variance must have the shape of mean (samples, outputs), or that of its covariance "
            f"(samples, outputs, outputs), got mean {mu.shape} and variance {covariance.shape}."
        )
    return mu, covariance


def joined(parts: list[GaussianPredictions]) -> GaussianPredictions:
    """Predictions of several batches as one."""
    epistemic = [p.epistemic_variance for p in parts if p.epistemic_variance is not None]
    return GaussianPredictions(
        mean=np.concatenate([p.mean for p in parts]),
        targets=np.concatenate([p.targets for p in parts]),
        total_variance=np.concatenate([p.total_variance for p in parts]),
        epistemic_variance=np.concatenate(epistemic) if epistemic else None,
        nll=np.concatenate([p.nll for p in parts]),
    )


def likelihood_name(likelihood: Any) -> str:
    """A likelihood by name, whether it is an enum or a string."""
    return str(getattr(likelihood, "value", likelihood))


# Checks. What is wrong raises a ValueError that names it, its row and the remedy.


def first_bad_row(ok: np.ndarray) -> int | None:
    """Index of the first sample of a boolean [n, ...] that does not hold throughout."""
    rows = ok.reshape(len(ok), -1).all(axis=1)
    return None if rows.all() else int(np.argmin(rows))


def finite(values: Values, name: str) -> FloatArray:
    """Values in float64, of which there must be some, and none NaN or infinite."""
    array = to_numpy(values).astype(np.float64)
    if array.ndim == 0 or len(array) == 0:
        raise ValueError(f"{name} must hold at least one sample, got shape {array.shape}.")
    row = first_bad_row(np.isfinite(array))
    if row is not None:
        raise ValueError(
            f"{name} must be finite, got {array[row]} in row {row}; "
            "look for NaN or infinite weights and inputs."
        )
    return array


def probabilities(values: Values, name: str = "probs") -> FloatArray:
    """Class probabilities [n, C], C ≥ 2, in float64.

    Sums must be one within 1e-3, or within the dtype's resolution where that is coarser.
    """
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(
            f"{name} must have shape (samples, classes) with at least two classes, got "
            f"{tuple(values.shape)}; for one probability p per sample stack (1 - p, p)."
        )
    array = finite(values, name)
    tolerance = max(SUM_TOLERANCE, float(resolution_of(values).eps))
    sums = array.sum(axis=1)
    in_range = (array >= 0.0) & (array <= 1.0 + tolerance)
    row = first_bad_row(in_range & (np.abs(sums - 1.0) <= tolerance)[:, None])
    if row is not None:
        raise ValueError(
            f"{name} must be non-negative and sum to one over classes, got {array[row]} with sum "
            f"{sums[row]:.6g} in row {row}; apply a softmax to logits."
        )
    return array


def class_labels(values: Values, n_samples: int, n_classes: int) -> IntArray:
    """Labels [n] as integers in 0..C-1."""
    labels = to_numpy(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise ValueError(
            f"labels must be one class index per sample, got dtype {labels.dtype} and shape "
            f"{labels.shape}; turn one-hot labels into indices with argmax(-1)."
        )
    if labels.dtype == bool and n_classes > 2:
        raise ValueError(
            f"labels are booleans, but there are {n_classes} classes; give class indices."
        )
    _same_length("labels", len(labels), n_samples)
    row = first_bad_row((labels >= 0) & (labels < n_classes))
    if row is not None:
        raise ValueError(
            f"labels must lie in 0..{n_classes - 1}, got {labels[row]} in row {row}; "
            "leave out samples that have no label, or name what marks these (ignore_index)."
        )
    return labels.astype(np.int64)


def label_probabilities(values: Values, name: str = "probs") -> FloatArray:
    """Probabilities [n, K] of K binary labels in float64; a vector [n] stands for K = 1."""
    if values.ndim not in (1, 2):
        raise ValueError(
            f"{name} of binary labels must have shape (samples, labels), got {tuple(values.shape)}."
        )
    array = finite(values, name)
    row = first_bad_row((array >= 0.0) & (array <= 1.0))
    if row is not None:
        raise ValueError(
            f"{name} of binary labels must lie in [0, 1], got {array[row]} in row {row}; apply a "
            "sigmoid to logits."
        )
    return array[:, None] if array.ndim == 1 else array


def binary_labels(values: Values, shape: tuple[int, ...]) -> IntArray:
    """Labels [n, K] in the probabilities' shape, each 0 or 1; a vector [n] stands for K = 1."""
    labels = _shaped("binary labels", to_numpy(values), shape, "give one label per output")
    row = first_bad_row((labels == 0) | (labels == 1))
    if row is not None:
        raise ValueError(
            f"binary labels must be 0 or 1 to be scored, got {labels[row]} in row {row}."
        )
    return labels.astype(np.int64)


def regression_targets(values: Values, shape: tuple[int, ...]) -> FloatArray:
    """Targets [n, K] in the shape of the predictive mean; a vector [n] stands for K = 1."""
    return _shaped("targets", finite(values, "targets"), shape, "they are not broadcast")


def _shaped(name: str, values: np.ndarray, shape: tuple[int, ...], hint: str) -> np.ndarray:
    if values.ndim > 0:
        _same_length(name, len(values), shape[0])
    if values.ndim == 1 and shape[1] == 1:
        values = values[:, None]
    if values.shape != shape:
        raise ValueError(
            f"{name} must have the shape of the predictions {shape}, got {values.shape}; {hint}."
        )
    return values


def count(value: Any, name: str) -> int:
    """A positive integer of at most a million."""
    number = as_integer(name, value)
    if not 1 <= number <= LARGEST_COUNT:
        raise ValueError(
            f"{name} must be at least 1 and at most {LARGEST_COUNT}, got {str(number)[:20]}."
        )
    return number


def resolution_of(values: Values) -> Any:
    """``finfo`` of the dtype: its ``tiny`` is what a probability of zero stands for."""
    if isinstance(values, torch.Tensor):
        return torch.finfo(values.dtype if values.dtype.is_floating_point else torch.float64)
    floating = np.issubdtype(values.dtype, np.floating)
    return np.finfo(values.dtype if floating else np.float64)


def _same_length(name: str, got: int, n_samples: int) -> None:
    if got != n_samples:
        raise ValueError(
            f"{name} must match the predictions sample by sample, got {got} for {n_samples} "
            "predictions; the loader must walk the same samples, without drop_last."
        )
