"""Weighted disjoint draws follow the law that the magnitudes need."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_debiased.data.pool import GIBBS_SWEEPS, draw_weighted_folds, sampling_probabilities

# A law is a dict from a tuple of count vectors, one per fold, to its probability.


def fold_law(q, allowed, size):
    """Exact law of the counts of i.i.d. draws from q restricted to ``allowed``."""
    support = [n for n in range(len(q)) if allowed[n]]
    mass = sum(q[n] for n in support)
    law = {}
    for drawn in itertools.product(support, repeat=size):
        counts = tuple(drawn.count(n) for n in range(len(q)))
        law[counts] = law.get(counts, 0) + math.prod(q[n] / mass for n in drawn)
    return law


def joint_law(q, sizes):
    """The symmetric target Π q(f_k) 1[disjoint], normalised."""
    every = [fold_law(q, [True] * len(q), size) for size in sizes]
    law = {
        state: math.prod(p[f] for p, f in zip(every, state, strict=True))
        for state in itertools.product(*every)
        if all(sum(c > 0 for c in per_sample) <= 1 for per_sample in zip(*state, strict=True))
    }
    total = sum(law.values())
    return {state: p / total for state, p in law.items()}


def unoccupied(state, k):
    others = [f for j, f in enumerate(state) if j != k]
    return tuple(not any(per_sample) for per_sample in zip(*others, strict=True))


def gibbs_law(q, sizes, sweeps):
    """Exact law of the documented algorithm: random partition, then sweeps over the folds."""
    law = {}
    partitions = list(itertools.permutations(n % len(sizes) for n in range(len(q))))
    for side in partitions:
        starts = [fold_law(q, [s == k for s in side], size) for k, size in enumerate(sizes)]
        for state in itertools.product(*starts):
            p = math.prod(start[f] for start, f in zip(starts, state, strict=True))
            law[state] = law.get(state, 0) + p / len(partitions)
    for _ in range(sweeps):
        for k in range(len(sizes)):
            law = _redrawn(law, q, sizes, k)
    return law


def _redrawn(law, q, sizes, k):
    redrawn, conditional = {}, {}
    for state, p in law.items():
        allowed = unoccupied(state, k)
        if allowed not in conditional:
            conditional[allowed] = fold_law(q, allowed, sizes[k])
        for fold, chance in conditional[allowed].items():
            new = (*state[:k], fold, *state[k + 1 :])
            redrawn[new] = redrawn.get(new, 0) + p * chance
    return redrawn


def conditional_error(law, q, sizes, k):
    """Mean total variation between fold k given the others and i.i.d. draws from the rest.

    The bias of a mean of x over fold k is at most this times twice the largest weighted |x|.
    """
    given = {}
    for state, p in law.items():
        others = (*state[:k], None, *state[k + 1 :])
        given.setdefault(others, {})[state[k]] = p
    error = 0.0
    for others, found in given.items():
        state = tuple(f if f is not None else (0,) * len(q) for f in others)
        wanted = fold_law(q, unoccupied(state, k), sizes[k])
        total = sum(found.values())
        error += 0.5 * sum(abs(found.get(f, 0) - total * p) for f, p in wanted.items())
    return error


POOLS = [
    ((0.25, 0.25, 0.25, 0.25), (2, 2)),
    ((0.45, 0.45, 0.05, 0.05), (2, 2)),
    ((0.7, 0.1, 0.1, 0.1), (2, 2)),
    ((0.4, 0.3, 0.1, 0.1, 0.1), (3, 2)),
    ((0.6, 0.1, 0.1, 0.1, 0.1), (1, 1, 1)),
    ((0.3, 0.3, 0.2, 0.2), (2, 1, 1)),
]


@pytest.mark.parametrize(("q", "sizes"), POOLS)
def test_under_the_target_each_fold_is_independent_draws_from_what_the_others_left(q, sizes):
    law = joint_law(q, sizes)
    assert max(conditional_error(law, q, sizes, k) for k in range(len(sizes))) < 1e-12


@pytest.mark.parametrize(("q", "sizes"), POOLS)
def test_gibbs_sweeps_reach_that_law_even_when_the_draws_exhaust_the_pool(q, sizes):
    start = gibbs_law(q, sizes, 0)
    last = gibbs_law(q, sizes, GIBBS_SWEEPS)
    assert sum(last.values()) == pytest.approx(1)
    errors = [
        [conditional_error(law, q, sizes, k) for k in range(len(sizes))] for law in (start, last)
    ]
    assert max(errors[0]) > 3e-3
    assert max(errors[1]) < 1e-4


def tallied(h, sizes, epsilon, n_runs, **arguments):
    generator = torch.Generator().manual_seed(7)
    found, q = {}, sampling_probabilities(h, epsilon)
    for _ in range(n_runs):
        draws = draw_weighted_folds(q, sizes, generator, **arguments)
        counts = torch.zeros(len(sizes), len(h), dtype=torch.int64)
        counts[draws.folds, draws.indices] = draws.counts
        state = tuple(map(tuple, counts.tolist()))
        found[state] = found.get(state, 0) + 1
    return found


def chi_square_sd(found, law, n_runs):
    """Pearson's statistic against ``law`` in standard deviations from its mean."""
    assert set(found) <= set(law)
    statistic = sum((found.get(s, 0) - n_runs * p) ** 2 / (n_runs * p) for s, p in law.items())
    dof = len(law) - 1
    return (statistic - dof) / math.sqrt(2 * dof)


H = torch.tensor([4.0, 2.0, 1.0, 1.0])


def test_code_draws_from_the_symmetric_law():
    # Seed 7, 600 draws, 24 cells: 4.5 sd of chi square, error rate below 1e-3.
    q = sampling_probabilities(H, 0.2).tolist()
    found = tallied(H, (2, 1), 0.2, 600, symmetric=True, sweeps=5)
    assert abs(chi_square_sd(found, joint_law(q, (2, 1)), 600)) < 4.5
    wrong = tallied(H, (2, 1), 0.2, 600, symmetric=False)
    assert chi_square_sd(wrong, joint_law(q, (2, 1)), 600) > 6


def test_code_draws_one_after_the_other_when_not_symmetric():
    # Seed 7, 600 draws, as above.
    q = sampling_probabilities(H, 0.2).tolist()
    law = {}
    for first, p in fold_law(q, [True] * 4, 2).items():
        for second, chance in fold_law(q, [c == 0 for c in first], 1).items():
            law[first, second] = p * chance
    found = tallied(H, (2, 1), 0.2, 600, symmetric=False)
    assert abs(chi_square_sd(found, law, 600)) < 4.5


@settings(max_examples=20, deadline=None)
@given(
    h=st.lists(st.floats(0, 1e6), min_size=4, max_size=12),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    epsilon=st.floats(0.01, 1),
    symmetric=st.booleans(),
    seed=st.integers(0, 5),
)
def test_folds_are_disjoint_of_the_right_size_with_bounded_weights(
    h, sizes, epsilon, symmetric, seed
):
    if sum(sizes) > len(h):
        return
    h = torch.tensor(h)
    q = sampling_probabilities(h, epsilon)
    first, again = (
        draw_weighted_folds(
            q, sizes, torch.Generator().manual_seed(seed), symmetric=symmetric, sweeps=3
        )
        for _ in range(2)
    )
    assert len(torch.unique(first.indices)) == len(first)
    assert torch.bincount(first.folds, weights=first.counts).tolist() == sizes
    assert torch.allclose(first.weights, 1 / (len(h) * q[first.indices]), rtol=1e-12)
    assert float(first.weights.max()) <= 1 / epsilon * (1 + 1e-12)
    assert torch.equal(first.indices, again.indices)


@settings(max_examples=25, deadline=None)
@given(
    h=st.lists(st.floats(0, 1e300), min_size=1, max_size=9),
    epsilon=st.floats(1e-3, 1),
    scale=st.floats(1e-3, 1e3),
)
def test_probabilities_sum_to_one_and_ignore_the_scale_of_h(h, epsilon, scale):
    h = torch.tensor(h, dtype=torch.float64)
    q = sampling_probabilities(h, epsilon)
    assert float(q.sum()) == pytest.approx(1, rel=1e-12)
    assert float(q.min()) >= epsilon / len(h) * (1 - 1e-12)
    if float(h.max()) > 1e-290:
        assert torch.allclose(q, sampling_probabilities(h * scale, epsilon), rtol=1e-9, atol=0)


def test_no_curvature_anywhere_means_uniform():
    assert sampling_probabilities(torch.zeros(4), 0.1).tolist() == [0.25] * 4
