"""The refinement between grid points: where a loss is lowest, whatever rounding adds to it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from laplace_debiased.tuning.moments import lowest

ENDS = math.log(10.0), math.log(1000.0)


def loss_around(place: float, noise: float = 0.0, seed: int = 0) -> Callable[[float], float]:
    """A skewed valley, with a rounding error that depends on nothing but chance."""
    rng = random.Random(seed)

    def loss(log_prior: float) -> float:
        t = log_prior - place
        return 0.3 + 0.02 * t * t + 0.003 * t**3 + noise * rng.uniform(-1.0, 1.0)

    return loss


@pytest.mark.parametrize("place", [3.0, 4.0, 4.61, 4.625, 5.5])
def test_the_lowest_place_is_found(place: float) -> None:
    prior, value = lowest(loss_around(place), 100.0, ENDS)
    assert math.log(prior) == pytest.approx(place, abs=1e-3)
    assert value <= 0.3 + 1e-7


@pytest.mark.parametrize("place", [4.6, 4.625, 4.65, 4.7123])
def test_rounding_moves_it_by_no_more_than_rounding(place: float) -> None:
    """Lattice points and the middles between them are among the places."""
    found = [math.log(lowest(loss_around(place, 1e-14, seed), 90.0, ENDS)[0]) for seed in range(20)]
    assert max(found) - min(found) <= 1e-8


def test_the_centre_stays_where_nothing_is_better() -> None:
    def flat(_: float) -> float:
        return 0.3

    assert lowest(flat, 100.0, ENDS) == (100.0, 0.3)


@pytest.mark.parametrize("falling", [-1.0, 1.0])
def test_at_an_end_the_end_is_the_lowest_place(falling: float) -> None:
    prior, _ = lowest(lambda t: 0.3 + 0.01 * falling * t, 100.0, ENDS)
    end = ENDS[0] if falling > 0 else ENDS[1]
    assert math.log(prior) == pytest.approx(end, abs=0.05)
