"""Levenberg-Marquardt damping and backtracking."""

import math

import pytest

from laplace_debiased.optim import Backtracking, LevenbergMarquardt


@pytest.mark.parametrize(
    ("ratio", "expected"), [(-math.inf, 2.0), (0.24, 2.0), (0.25, 1.0), (0.75, 1.0), (0.76, 0.5)]
)
def test_damping_follows_the_reduction_ratio(ratio, expected):
    assert LevenbergMarquardt(factor=2.0).adapt(1.0, ratio) == expected


def test_damping_stays_in_its_range():
    rule = LevenbergMarquardt(factor=10.0, min_damping=1e-3, max_damping=1e2)
    assert rule.adapt(50.0, -1.0) == 1e2
    assert rule.adapt(2e-3, 1.0) == 1e-3
    assert rule.adapt(0.0, -1.0) == 1e-3  # out of 0 it can grow
    assert rule.adapt(0.0, 1.0) == 0.0  # and a good step leaves it there
    assert rule.adapt(1e3, -1.0) == 1e3
    assert rule.adapt(1e-4, 1.0) == 1e-4


def test_a_ratio_that_is_nan_is_an_error():
    with pytest.raises(ValueError, match="reduction_ratio is NaN"):
        LevenbergMarquardt().adapt(1.0, math.nan)


def test_backtracking_takes_the_first_step_that_falls_enough():
    # Along f(t) = −t + t², Armijo with share c holds for t ≤ 1 − c.
    trial = Backtracking(shrink=0.5, sufficient=0.2).search(lambda t: -t + t * t, 0.0, -1.0, 4.0)
    assert (trial.step_size, trial.loss, trial.n_evaluations) == (0.5, -0.25, 4)
    at_once = Backtracking(sufficient=0.0).search(lambda t: -t + t * t, 0.0, -1.0, 1.0)
    assert (at_once.step_size, at_once.n_evaluations) == (1.0, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_backtracking_shrinks_away_from_losses_that_are_not_finite(bad):
    trial = Backtracking().search(lambda t: -t if t < 0.3 else bad, 0.0, -1.0, 1.0)
    assert trial.step_size == 0.25


def test_backtracking_gives_up_with_no_step():
    trial = Backtracking(max_trials=5).search(lambda t: 1.0 + t, 1.0, -1.0, 1.0)
    assert (trial.step_size, trial.loss, trial.n_evaluations) == (0.0, 1.0, 5)


def test_backtracking_never_accepts_an_increase_along_an_ascent():
    trial = Backtracking(sufficient=0.5).search(lambda t: 1.0 + t, 1.0, 10.0, 1.0)
    assert trial.step_size == 0.0


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        (LevenbergMarquardt, {"factor": 1.0}),
        (LevenbergMarquardt, {"lower": 0.8}),
        (LevenbergMarquardt, {"min_damping": 0.0}),
        (Backtracking, {"shrink": 1.0}),
        (Backtracking, {"sufficient": 1.0}),
        (Backtracking, {"max_trials": 0}),
    ],
)
def test_bad_settings_are_named(rule, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        rule(**bad)


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        (LevenbergMarquardt, ("factor", "lower", "upper", "min_damping", "max_damping")),
        (Backtracking, ("shrink", "sufficient", "max_trials")),
    ],
)
def test_what_is_no_number_is_named(rule, names):
    for name in names:
        for bad in ("x", None, True):
            with pytest.raises(TypeError, match=f"^{name} must be"):
                rule(**{name: bad})
    with pytest.raises(TypeError, match="max_trials must be"):
        Backtracking(max_trials=2.5)
