"""The grid: where its points lie, how far it goes, and which of them it chooses."""

from __future__ import annotations

import math

import pytest
import torch

from laplace_debiased.tuning import PriorGrid

SMALL = PriorGrid(size=9)
"""Open at both ends, one point per decade within."""


def test_by_default_it_reaches_beyond_the_hosts_ends_two_points_per_decade() -> None:
    points = PriorGrid().points()
    assert points[0] == pytest.approx(1e-10)
    assert points[-1] == pytest.approx(1e12)
    gaps = points.log10().diff()
    inner = (points[:-1] >= 0.99e-6) & (points[:-1] < 0.99e8)
    assert torch.allclose(gaps[inner], torch.tensor(0.5).double())
    assert torch.allclose(gaps[~inner], torch.tensor(1.0).double())


def test_ends_that_are_given_are_kept() -> None:
    points = PriorGrid(-2, 3, 6).points()
    assert points.tolist() == pytest.approx([10.0**k for k in range(-2, 4)])
    half = PriorGrid(log_max=3).points()
    assert half[-1] == pytest.approx(1e3)
    assert half[0] == pytest.approx(1e-10)
    assert PriorGrid(0, 5, 6, base=2.0).points().tolist() == [1, 2, 4, 8, 16, 32]
    assert PriorGrid(-4, None, 1).points().tolist() == pytest.approx([1e-4])
    assert PriorGrid().bounded().points().tolist() == pytest.approx(
        torch.logspace(-4, 4, 17).tolist()
    )


@pytest.mark.parametrize("grid", [PriorGrid(), PriorGrid(-3, 4, 3), PriorGrid(size=5)])
def test_nodes_hold_the_points_and_no_inner_gap_is_wider_than_half_a_decade(
    grid: PriorGrid,
) -> None:
    nodes, on_grid = grid.nodes()
    assert torch.equal(nodes, nodes.sort()[0])
    assert torch.allclose(nodes[on_grid].exp(), grid.points())
    inner = nodes[(nodes >= math.log(1e-4)) & (nodes <= math.log(1e4))]
    assert float(inner.diff().max()) <= 0.5 * math.log(10) + 1e-9


def losses(low: float, high: float, *changes: tuple[int, float]) -> list[float]:
    """A curve over SMALL's points, linear but for some of them."""
    values = torch.linspace(low, high, len(SMALL.points())).tolist()
    for index, value in changes:
        values[index] = value
    return values


def test_the_lowest_loss_inside_is_chosen_and_asks_for_no_wider_grid() -> None:
    curve = losses(3.0, 2.0, (7, 1.0), (3, math.nan), (8, -math.inf))
    assert SMALL.best(curve) == 7
    assert SMALL.wider(curve) is None
    assert SMALL.best([math.nan] * len(curve)) is None


@pytest.mark.parametrize("rising", [False, True])
def test_a_loss_that_still_falls_at_an_open_end_asks_for_more(rising: bool) -> None:
    curve = losses(1.0, 2.0) if rising else losses(2.0, 1.0)
    wider = SMALL.wider(curve)
    assert wider is not None
    assert wider.further == ((4, 0) if rising else (0, 4))
    before, after = SMALL.points(), wider.points()
    assert len(after) == len(before) + 4
    assert bool(torch.isclose(after[4:] if rising else after[:-4], before).all())
    closed = PriorGrid(-4, 4, 9)
    assert closed.wider(curve[:9]) is None
    assert closed.best(curve[:9]) == (0 if rising else 8)


def test_of_a_flat_end_the_point_where_it_begins_is_chosen() -> None:
    n = len(SMALL.points())
    flat = [(k, 1.0 - 1e-8 * k) for k in range(n - 6, n)]
    curve = losses(3.0, 1.5, *flat)
    assert SMALL.wider(curve) is None
    assert SMALL.best(curve) == n - 6
    # No number beyond: what is the last finite point is an end as well.
    assert SMALL.best([*curve[:-2], math.nan, math.inf]) == n - 6
