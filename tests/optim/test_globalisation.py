"""Levenberg-Marquardt damping and backtracking."""

import math

import pytest

from laplace_debiased.optim.newton_cg import adapted, backtracked


@pytest.mark.parametrize(
    ("ratio", "expected"), [(-math.inf, 3.0), (0.24, 3.0), (0.25, 2.0), (0.75, 2.0), (0.76, 4 / 3)]
)
def test_damping_follows_the_reduction_ratio(ratio, expected):
    assert adapted(2.0, ratio) == expected


def test_damping_stays_in_its_range():
    assert adapted(0.9e8, -1.0) == 1e8
    assert adapted(1.2e-8, 1.0) == 1e-8
    assert adapted(0.0, -1.0) == 1e-8  # out of 0 it can grow
    assert adapted(0.0, 1.0) == 0.0  # and a good step leaves it there
    assert adapted(1e9, -1.0) == 1e9
    assert adapted(1e-9, 1.0) == 1e-9


def test_backtracking_takes_the_first_step_that_falls_enough():
    # Along f(t) = −t + t², Armijo with share c = 1e-2 holds for t ≤ 1 − c.
    trial = backtracked(lambda t: -t + t * t, 0.0, -1.0, 4.0)
    assert (trial.step_size, trial.loss, trial.n_evaluations) == (0.5, -0.25, 4)
    at_once = backtracked(lambda t: -t + t * t, 0.0, -1.0, 0.99)
    assert (at_once.step_size, at_once.n_evaluations) == (0.99, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_backtracking_shrinks_away_from_losses_that_are_not_finite(bad):
    trial = backtracked(lambda t: -t if t < 0.3 else bad, 0.0, -1.0, 1.0)
    assert trial.step_size == 0.25


def test_backtracking_gives_up_with_no_step():
    trial = backtracked(lambda t: 1.0 + t, 1.0, -1.0, 1.0)
    assert (trial.step_size, trial.loss, trial.n_evaluations) == (0.0, 1.0, 12)


def test_backtracking_never_accepts_an_increase_along_an_ascent():
    trial = backtracked(lambda t: 1.0 + t, 1.0, 10.0, 1.0)
    assert trial.step_size == 0.0
