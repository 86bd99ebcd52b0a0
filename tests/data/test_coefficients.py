"""Magnitude coefficients are unbiased for the pool's mean along directions of other folds."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from laplace_debiased.data.coefficients import draw_coefficients, magnitude_coefficients
from laplace_debiased.data.plan import CurvaturePlan, plan_of
from laplace_debiased.data.pool import draw_weighted_folds, sampling_probabilities
from laplace_debiased.data.sources import Batch, Draws
from tests.data.test_weighted import joint_law
from tests.data.toys import Numbers, plan_from_loader


@dataclass(frozen=True)
class Listed:
    """A source that was drawn already."""

    draws: Draws

    def walk(self):
        yield Batch(**vars(self.draws), inputs=None, targets=torch.zeros(len(self.draws)))


def planned(folds_of_counts, q, **arguments) -> CurvaturePlan:
    """Plan of given count vectors [M] per fold, drawn with probabilities q [M]."""
    positions = [torch.tensor(c).nonzero().squeeze(1) for c in folds_of_counts]
    where = torch.cat(positions)
    draws = Draws(
        folds=torch.cat([torch.full_like(p, k) for k, p in enumerate(positions)]),
        counts=torch.cat(
            [torch.tensor(c)[p] for c, p in zip(folds_of_counts, positions, strict=True)]
        ),
        weights=1 / (len(q) * q[where]),
        indices=where,
    )
    sizes = {"population": len(q), "n_data": len(q), **arguments}
    return plan_of((Listed(draws),), n_folds=len(folds_of_counts), pool_size=len(q), **sizes)


def rows(m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, 3, generator=torch.Generator().manual_seed(seed)).double()


def top_direction(plan, draws, rows, basis):
    c = draw_coefficients(plan, draws, basis)
    x = rows[draws.indices]
    return torch.linalg.eigh(x.T @ (c[:, None] * x)).eigenvectors[:, -1]


def errors(plan, rows, basis):
    """λ(u) − pool mean along the top direction of ``basis``: with Z, and with plain weights."""
    draws = plan.sources[0].draws
    x = (rows @ top_direction(plan, draws, rows, basis)) ** 2
    drawn = x[draws.indices]
    others = set(range(plan.n_folds)) - set(basis)
    corrected = magnitude_coefficients(plan, draws, basis) @ drawn
    plain = draw_coefficients(plan, draws, others) @ drawn
    return torch.stack([corrected, plain]) - x.mean()


def uniform_law(n_pool, sizes):
    """Every ordered split of the pool into folds of ``sizes`` and a rest, equally likely."""
    states = set()
    for order in itertools.permutations(range(n_pool)):
        state, start = [], 0
        for size in sizes:
            chosen = set(order[start : start + size])
            state.append(tuple(int(n in chosen) for n in range(n_pool)))
            start += size
        states.add(tuple(state))
    return dict.fromkeys(states, 1 / len(states))


@pytest.mark.parametrize(
    ("sizes", "basis"),
    [((2, 2), {0}), ((2, 2), {1}), ((1, 3), {0}), ((2, 1, 2), {0, 2}), ((2, 1, 1), {1})],
)
def test_exactly_unbiased_over_every_uniform_draw(sizes, basis):
    q = torch.full((5,), 0.2, dtype=torch.float64)
    law = uniform_law(5, sizes)
    bias = sum(p * errors(planned(state, q), rows(5), basis) for state, p in law.items())
    assert abs(float(bias[0])) < 1e-12
    assert abs(float(bias[1])) > 0.05


@pytest.mark.parametrize(
    ("sizes", "basis"),
    [((2, 2), {0}), ((2, 2), {1}), ((3, 1), {0}), ((1, 1, 2), {0, 2}), ((1, 1, 2), {1, 2})],
)
def test_exactly_unbiased_in_every_direction_over_every_symmetric_weighted_draw(sizes, basis):
    q = sampling_probabilities(torch.tensor([5.0, 3.0, 1.0, 1.0, 0.0]), 0.3)
    law = joint_law(q.tolist(), sizes)
    assert math.isclose(sum(law.values()), 1)
    bias = sum(p * errors(planned(state, q), rows(5), basis) for state, p in law.items())
    assert abs(float(bias[0])) < 1e-12
    assert abs(float(bias[1])) > 0.05


def test_unbiased_given_each_directions_batch_not_only_on_average():
    q = sampling_probabilities(torch.tensor([5.0, 3.0, 1.0, 1.0, 0.0]), 0.3)
    given: dict = {}
    for state, p in joint_law(q.tolist(), (2, 2)).items():
        given.setdefault(state[0], []).append(p * errors(planned(state, q), rows(5), {0})[0])
    assert max(abs(float(sum(parts))) for parts in given.values()) < 1e-12


def mean_errors_over_pools(sizes, basis, q_of, law_of):
    """Bias for all 6 rows of a population, over every pool of 4 of them and every draw from it.

    Returns it with the population and with the pool taken for the population, and given each
    directions' batch (as population indices) with the population.
    """
    everything = rows(6, seed=2)
    pools = list(itertools.combinations(range(6), 4))
    total, given = torch.zeros(2, dtype=torch.float64), {}
    for pool in pools:
        q = q_of(list(pool))
        for state, p in law_of(q).items():
            found = []
            for population in (6, 4):
                plan = planned(state, q, population=population)
                draws = plan.sources[0].draws
                mine = everything[list(pool)]
                u = top_direction(plan, draws, mine, basis)
                x = (everything @ u) ** 2
                c = magnitude_coefficients(plan, draws, basis)
                found.append(c @ x[list(pool)][draws.indices] - x.mean())
            chance = p / len(pools)
            total += chance * torch.stack(found)
            key = tuple(tuple(pool[i] for i in range(4) if state[k][i]) for k in sorted(basis))
            given[key] = given.get(key, 0.0) + chance * float(found[0])
    return total, given


@pytest.mark.parametrize(("sizes", "basis"), [((2, 2), {0}), ((1, 2), {1}), ((1, 1, 2), {0, 2})])
def test_a_pool_that_is_a_sample_is_unbiased_for_its_population_given_each_direction(sizes, basis):
    total, given = mean_errors_over_pools(
        sizes,
        basis,
        lambda pool: torch.full((4,), 0.25, dtype=torch.float64),
        lambda q: uniform_law(4, sizes),
    )
    assert max(map(abs, given.values())) < 1e-12
    assert abs(float(total[0])) < 1e-12
    assert abs(float(total[1])) > 0.05


def test_weighted_draws_from_a_sampled_pool_are_nearly_unbiased_for_its_population():
    h = torch.tensor([5.0, 3.0, 1.0, 1.0, 0.5, 2.0])
    total, _ = mean_errors_over_pools(
        (1, 2),
        {1},
        lambda pool: sampling_probabilities(h[pool], 0.3),
        lambda q: joint_law(q.tolist(), (1, 2)),
    )
    # Left over is how Σh depends on the pool, here with 4 samples; it vanishes as 1/M.
    assert abs(float(total[0])) < 0.01 * abs(float(total[1]))


def test_a_sampled_pool_gives_the_documented_mixture_of_the_population():
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(Numbers(40), range(5, 15)), batch_size=50
    )
    for budget in (6, None):
        plan = plan_from_loader(loader, folds=2, n_samples=budget, n_data=100)
        c = magnitude_coefficients(plan, _batch(plan), {0})
        folds, m = _batch(plan).folds, plan.fold_sizes[0]
        assert c[folds == 0].tolist() == pytest.approx([1 / 100] * m)
        assert c[folds == 1].tolist() == pytest.approx([(1 - m / 100) / m] * m)


def test_statistically_unbiased_in_both_directions_with_the_code_that_draws():
    # Seed 3, 500 draws, 15 + 15 of 60, heavy-tailed h. |z| < 4 twice: error rate 1.3e-4. Plain
    # weights without Z lie more than 6 standard errors off.
    pool = rows(60, seed=1) * torch.linspace(0.2, 4, 60)[:, None]
    h, generator = (pool**2).sum(1), torch.Generator().manual_seed(3)
    q = sampling_probabilities(h, 0.1)
    found = []
    for _ in range(500):
        counts = torch.zeros(2, 60, dtype=torch.int64)
        drawn = draw_weighted_folds(q, (15, 15), generator, symmetric=True, sweeps=2)
        counts[drawn.folds, drawn.indices] = drawn.counts
        plan = planned(counts.tolist(), q)
        found.append(torch.stack([errors(plan, pool, {basis}) for basis in (0, 1)]))
    stacked = torch.stack(found)
    z = stacked.mean(0) / (stacked.std(0) / len(found) ** 0.5)
    assert z[:, 0].abs().max() < 4
    assert z[:, 1].max() < -6


def test_constant_curvature_needs_no_draw_at_all():
    # x_n ∝ q_n makes the weighted estimate exact for any draw: no variance, so no tolerance.
    h = torch.tensor([4.0, 2.0, 1.0, 1.0, 2.0])
    q = sampling_probabilities(h, 0.5)
    for state in joint_law(q.tolist(), (2, 2)):
        plan = planned(state, q)
        draws = plan.sources[0].draws
        c = magnitude_coefficients(plan, draws, {0})
        assert float(c @ q[draws.indices]) == pytest.approx(1 / 5, rel=1e-12)


def test_uniform_coefficients_are_the_documented_mixture():
    plan = plan_from_loader(_loader(10), folds=2, fractions=(0.5, 0.5), n_samples=6)
    c = magnitude_coefficients(plan, _batch(plan), {0})
    folds = _batch(plan).folds
    assert c[folds == 0].tolist() == pytest.approx([1 / 10] * 3)
    assert c[folds == 1].tolist() == pytest.approx([0.7 / 3] * 3)


def test_coefficients_over_a_walk_sum_to_one_whatever_the_batches():
    plan = plan_from_loader(_loader(11, batch_size=3), folds=3, n_samples=8)
    for basis in ({0}, {0, 2}):
        total = sum(magnitude_coefficients(plan, b, basis).sum() for b in plan.batches())
        assert float(total) == pytest.approx(1, rel=1e-12)
        own = sum(draw_coefficients(plan, b, basis).sum() for b in plan.batches())
        assert float(own) == pytest.approx(1, rel=1e-12)


def test_all_data_in_two_folds_gives_the_mean_over_all_data():
    plan = plan_from_loader(_loader(7), folds=2)
    for basis in ({0}, {1}):
        c = magnitude_coefficients(plan, _batch(plan), basis)
        assert c.tolist() == pytest.approx([1 / 7] * 7, rel=1e-12)


def test_unknown_population_leaves_the_own_part_out():
    draws = Draws.uniform(torch.tensor([0, 0, 1, 1, 1]))
    plan = plan_of((Listed(draws),), n_data=50, n_folds=2, population=None)
    assert magnitude_coefficients(plan, draws, {0}).tolist() == pytest.approx([0, 0] + [1 / 3] * 3)
    assert magnitude_coefficients(plan, draws, {1}).tolist() == [0.5, 0.5, 0, 0, 0]


def test_draw_coefficients_count_repeats_and_weigh():
    q = sampling_probabilities(torch.tensor([3.0, 1.0, 1.0]), 0.2)
    plan = planned([(2, 1, 0), (0, 0, 1)], q)
    weighted = draw_coefficients(plan, plan.sources[0].draws, {0})
    assert weighted.tolist() == pytest.approx([2 / 9 / float(q[0]), 1 / 9 / float(q[1]), 0])


def _loader(n, batch_size=50):
    return torch.utils.data.DataLoader(Numbers(n), batch_size=batch_size)


def _batch(plan):
    (batch,) = plan.batches()
    return batch


@pytest.mark.parametrize(("n_data", "is_left_out"), [(160, False), (2_100, False), (2_200, True)])
def test_uniform_directions_of_negligible_weight_are_left_out(n_data, is_left_out):
    # m_D / N <= 1 / (24 sqrt(m~)) with 20 + 20 draws: from N = 2,147 on.
    plan = plan_from_loader(_loader(n_data), folds=2, n_samples=40, seed=1)
    draws = plan.sources[0].draws
    c = magnitude_coefficients(plan, draws, {0})
    own, other = c[draws.folds == 0], c[draws.folds == 1]
    assert float(c.sum()) == pytest.approx(1, rel=1e-12)
    assert bool((own == 0).all()) is is_left_out
    if is_left_out:
        assert other.tolist() == pytest.approx([1 / 20] * 20)
    else:
        assert own.tolist() == pytest.approx([1 / n_data] * 20)


def test_weighted_directions_are_left_out_by_the_sizes_alone():
    # From N = 2,147 on, whatever was drawn. What is left stands for everything.
    q = sampling_probabilities(torch.linspace(0, 9, 1_000).double() ** 4, 0.02)
    for population, is_left_out in ((2_100, False), (2_200, True)):
        for first in (0, 900):  # of next to no curvature, and of much
            counts = torch.zeros(2, 1_000, dtype=torch.int64)
            counts[0, first : first + 20] = 1
            counts[1, first + 50 : first + 70] = 1
            plan = planned(counts.tolist(), q, population=population)
            draws = plan.sources[0].draws
            c = magnitude_coefficients(plan, draws, {0})
            assert bool((c[draws.folds == 0] == 0).all()) is is_left_out
        seen = float(q[draws.indices[draws.folds == 0]].sum())
        if is_left_out:
            mass = seen * 1_000 / 2_200 + (1 - seen) * (1 - 20 / 2_200) / (1 - 20 / 1_000)
            expected = mass * draws.weights[draws.folds == 1] / 20
            assert torch.allclose(c[draws.folds == 1], expected, rtol=1e-12, atol=0)


def test_leaving_directions_out_stays_within_the_standard_error():
    # Heavy-tailed rows, 24 + 24 of 6,000 by curvature: the magnitude along the directions' own top
    # eigenvector moves by less than its standard error in every draw; with the folds measured on
    # themselves it would be three times too large.
    pool = rows(6_000, seed=1) * torch.linspace(0.2, 2, 6_000)[:, None]
    h, generator = (pool**2).sum(1), torch.Generator().manual_seed(3)
    q, moved, excess = sampling_probabilities(h, 0.02), [], []
    for _ in range(20):
        counts = torch.zeros(2, 6_000, dtype=torch.int64)
        drawn = draw_weighted_folds(q, (24, 24), generator, symmetric=True, sweeps=2)
        counts[drawn.folds, drawn.indices] = drawn.counts
        plan = planned(counts.tolist(), q)
        draws = plan.sources[0].draws
        u = top_direction(plan, draws, pool, {0})
        x = ((pool @ u) ** 2)[draws.indices]
        left_out = magnitude_coefficients(plan, draws, {0})
        assert bool((left_out[draws.folds == 0] == 0).all())
        unseen, own = plan.unseen_mass[0], draws.folds == 0
        kept = torch.where(own, 1 / 6_000, left_out * unseen)
        terms = (draws.weights * x)[~own].repeat_interleave(draws.counts[~own])
        error = float(terms.std() / 24**0.5)
        moved.append(abs(float((left_out - kept) @ x)) / error)
        excess.append(float(draw_coefficients(plan, draws, {0}) @ x / (kept @ x)))
    assert max(moved) < 0.25
    assert sum(excess) / 20 > 1.2
