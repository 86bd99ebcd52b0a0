"""Predictions beside their targets, as validated arrays."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from laplace_debiased.calibration import checks, metrics
from laplace_debiased.calibration.batches import (
    FloatArray,
    IntArray,
    positions_as_samples,
    without_ignored,
)

Values = torch.Tensor | np.ndarray


@dataclass(frozen=True)
class ClassPredictions:
    """Predictions of a classifier, one row per label.

    Attributes:
        probs: Predictive probabilities [n, C]. K binary labels per sample are n = K · samples
            rows of two classes, sample by sample.
        labels: Class indices [n].
        floor: What a probability of zero stands for in a logarithm.
        labels_per_sample: K, the number of rows that belong to one sample.
        binary: Whether rows are binary labels, each with classes 0 and 1.
        information: Mutual information of label and weights [samples], in nats, summed over a
            sample's labels; None where it is not known.
    """

    probs: FloatArray
    labels: IntArray
    floor: float
    labels_per_sample: int = 1
    binary: bool = False
    information: FloatArray | None = None

    @property
    def entropy(self) -> FloatArray:
        """Predictive entropy [samples], in nats, summed over each sample's labels."""
        return self.summed(metrics.predictive_entropy(self.probs))

    @property
    def nll(self) -> FloatArray:
        """Negative log-likelihood [samples], in nats, summed over each sample's labels."""
        return self.summed(metrics.label_nll(self.probs, self.labels, self.floor))

    def by_sample(self, rows: np.ndarray) -> np.ndarray:
        """Values of rows [n] by sample: [n], or [samples, K]."""
        k = self.labels_per_sample
        return rows if k == 1 else rows.reshape(-1, k)

    def summed(self, rows: FloatArray) -> FloatArray:
        """Values of rows [n] summed over each sample's labels [samples]."""
        return rows.reshape(-1, self.labels_per_sample).sum(axis=1)


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


def rows_of(values: Values, binary: bool, name: str) -> FloatArray:
    """Checked probabilities as rows [n, C]: of each sample, position or binary label."""
    if binary:
        one = checks.label_probabilities(values, name).reshape(-1)
        return np.stack([1.0 - one, one], axis=1)  # [n, K] as rows [n · K, 2] of classes 0 and 1
    if values.ndim == 3:  # Sequences [n, T, C].
        values = values.reshape(-1, values.shape[-1])
    return checks.probabilities(values, name)


def class_rows(
    probs: Values, targets: np.ndarray, likelihood: Any, ignore_index: int | None = None
) -> ClassPredictions:
    """Predictions as rows; positions of sequences and labels that do not count are left out."""
    floor = float(checks.resolution_of(probs).tiny)
    if likelihood_name(likelihood) == "bernoulli":
        rows, n_labels = rows_of(probs, True, "probs"), 1 if probs.ndim == 1 else probs.shape[1]
        labels = checks.binary_labels(targets, (len(probs), n_labels)).reshape(-1)
        return ClassPredictions(rows, labels, floor, n_labels, True)
    probs, targets = positions_as_samples(probs, targets)
    rows, targets = without_ignored(rows_of(probs, False, "probs"), targets, ignore_index)
    return ClassPredictions(rows, checks.class_labels(targets, *rows.shape), floor)


def gaussian_predictions(
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
    except torch.linalg.LinAlgError as error:
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
