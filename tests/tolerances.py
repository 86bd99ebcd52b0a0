"""The one table of tolerances of the core's tests, and the comparisons that use it."""

import math

import torch
from torch import Tensor

EXACT = {torch.float64: 1e-8, torch.float32: 1e-5}
"""Norm-wise relative error against an oracle, or against laplace-torch, by dtype."""

SAME = {torch.float64: 1e-11, torch.float32: 1e-5}
"""Norm-wise relative error between two orders of the same sums (chunks, batches, permutations)."""

FINITE_DIFFERENCE = 1e-6
"""Norm-wise relative error of central differences in float64 with steps of 1e-5."""

INTERPOLATED = 1e-4
"""Relative error of what is interpolated between the nodes of a prior sweep."""

SIGMAS = 3.0
"""Standard errors that an unbiased mean may be off: error rate 0.3 % per seeded comparison."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ over all entries (‖actual‖ where expected is zero)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = float(expected.norm())
    return float((actual - expected).norm()) / (scale or 1.0)


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    """Equal to an oracle, as far as the dtype of ``actual`` allows."""
    error = relative_error(actual, expected)
    assert error <= EXACT[actual.dtype], f"relative error {error:.2e}"


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of sums."""
    error = relative_error(actual, expected)
    assert error <= SAME[actual.dtype], f"relative error {error:.2e}"


def standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first dimension."""
    return values.std(0) / math.sqrt(len(values))


def deviation(values: Tensor, expected: float | Tensor) -> Tensor:
    """How many standard errors the mean over the first dimension is off."""
    return (values.mean(0) - expected).abs() / standard_error(values)
