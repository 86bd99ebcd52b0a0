"""Validation of probabilities, labels, logits, means and variances."""

from typing import Any

import numpy as np
import torch

from laplace_debiased.calibration.batches import FloatArray, IntArray, to_numpy
from laplace_debiased.checks import as_integer

SUM_TOLERANCE = 1e-3

LARGEST_COUNT = 10**6
"""Bins that nobody needs, and that fit in memory."""


def first_bad_row(ok: np.ndarray) -> int | None:
    """Index of the first sample of a boolean [n, ...] that does not hold throughout."""
    rows = ok.reshape(len(ok), -1).all(axis=1)
    return None if rows.all() else int(np.argmin(rows))


def finite(values: torch.Tensor | np.ndarray, name: str) -> FloatArray:
    """Values in float64.

    Raises:
        ValueError: If there are none, or one is NaN or infinite (naming its row).
    """
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


def probabilities(values: torch.Tensor | np.ndarray, name: str = "probs") -> FloatArray:
    """Class probabilities [n, C] in float64.

    Raises:
        ValueError: If the shape is not [n, C] with C ≥ 2, or a row is not finite, not in [0, 1],
            or does not sum to one within 1e-3 (within the dtype's resolution, if that is coarser).
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


def class_labels(values: torch.Tensor | np.ndarray, n_samples: int, n_classes: int) -> IntArray:
    """Labels [n] as integers in 0..C-1.

    Raises:
        ValueError: If they are not integers, not one per sample, or out of range.
    """
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
            "leave out samples that have no label."
        )
    return labels.astype(np.int64)


def label_probabilities(values: torch.Tensor | np.ndarray, name: str = "probs") -> FloatArray:
    """Probabilities [n, K] of K binary labels in float64; a vector [n] stands for K = 1.

    Raises:
        ValueError: If the shape is neither, or one is not finite or not in [0, 1].
    """
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


def binary_labels(values: torch.Tensor | np.ndarray, shape: tuple[int, ...]) -> IntArray:
    """Labels [n, K], each 0 or 1; a vector [n] stands for K = 1.

    Raises:
        ValueError: If they do not have the probabilities' shape, or one is neither 0 nor 1.
    """
    labels = _shaped("binary labels", to_numpy(values), shape, "give one label per output")
    row = first_bad_row((labels == 0) | (labels == 1))
    if row is not None:
        raise ValueError(
            f"binary labels must be 0 or 1 to be scored, got {labels[row]} in row {row}."
        )
    return labels.astype(np.int64)


def regression_targets(values: torch.Tensor | np.ndarray, shape: tuple[int, ...]) -> FloatArray:
    """Targets [n, K]; a vector [n] stands for K = 1.

    Raises:
        ValueError: If they are not finite or do not have the shape of the predictive mean.
    """
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
    """A positive integer of at most a million.

    Raises:
        ArgumentTypeError: If it is not an integer.
        ValueError: If it is out of range.
    """
    number = as_integer(name, value)
    if not 1 <= number <= LARGEST_COUNT:
        raise ValueError(
            f"{name} must be at least 1 and at most {LARGEST_COUNT}, got {str(number)[:20]}."
        )
    return number


def resolution_of(values: torch.Tensor | np.ndarray) -> Any:
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
