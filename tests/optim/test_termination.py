"""Termination criteria."""

import pytest

from laplace_debiased.optim import StopReason, Termination, debiased_cg
from tests.optim.problems import quadratic


def test_iterations_are_limited():
    found = debiased_cg(quadratic(10, 0), quadratic(10, 1), termination=Termination(4))
    assert found.n_iterations == 4
    assert found.stop_reason is StopReason.MAX_ITERATIONS


@pytest.mark.parametrize("tolerance", [0.5, 1e-2, 1e-6])
def test_the_relative_residual_ends_at_the_first_iterate_below_it(tolerance):
    q = quadratic(10, 0)
    found = debiased_cg(q, quadratic(10, 1), termination=Termination(relative_residual=tolerance))
    norms = found.own_residual_norms / q.gradient.norm()
    assert norms[-1] <= tolerance
    assert (norms[:-1] > tolerance).all()
    assert found.stop_reason is StopReason.RESIDUAL


def test_progress_follows_the_formula_of_martens():
    rule = Termination(max_iterations=1000, relative_residual=0.0, relative_progress=1e-2)
    # q(x_i) = −1 + 2⁻ⁱ: over 10 iterations the relative progress falls below 10·1e-2 = 0.1 when
    # 2⁻ⁱ(2¹⁰ − 1)/(1 − 2⁻ⁱ) < 0.1, which i = 14 is the first to satisfy.
    values = [-1 + 0.5**i for i in range(40)]
    ends = [i for i in range(40) if rule.check(values[: i + 1], 1.0, 1.0, 50) is not None]
    assert ends[0] == 14
    assert rule.check(values, 1.0, 1.0, 50) is StopReason.PROGRESS


def test_progress_waits_for_the_window_and_for_a_negative_value():
    rule = Termination(relative_progress=1.0)
    assert rule.check([-1.0] * 11, 1.0, 1.0, 50) is None  # iteration 10 is not beyond the window
    assert rule.check([-1.0] * 12, 1.0, 1.0, 50) is StopReason.PROGRESS
    assert rule.check([1.0] * 12, 1.0, 1.0, 50) is None


def test_the_window_grows_with_the_iterations():
    rule = Termination(max_iterations=1000, relative_residual=0.0, relative_progress=1e-3)
    values = [-1.0 - i for i in range(900)]
    # Flat for the last 20: no progress over 10 iterations, but plenty over the window of 91.
    assert rule.check([*values, *[-2000.0] * 20], 1.0, 1.0, 1000) is None
    # Flat for as long as the window: 1/900 < 0.098.
    assert rule.check([*values, *[-901.0] * 99], 1.0, 1.0, 1000) is StopReason.PROGRESS


@pytest.mark.parametrize(
    "bad",
    [
        {"max_iterations": 0},
        {"relative_residual": -1.0},
        {"relative_residual": float("nan")},
        {"relative_progress": float("inf")},
    ],
)
def test_bad_criteria_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Termination(**bad)


def test_a_residual_that_ends_the_iteration_is_a_number():
    with pytest.raises(TypeError, match="relative_residual must be a number"):
        Termination(relative_residual=None)
