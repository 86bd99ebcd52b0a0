"""Plans that sample where curvature is."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler

from laplace_debiased.data import pool as pool_module
from laplace_debiased.data.build import Supply
from laplace_debiased.data.plan import PoolScores
from laplace_debiased.data.pool import (
    EPSILON,
    MAX_POOL_SIZE,
    sampling_probabilities,
    score_pool,
    useful_pool_size,
)
from tests.data.toys import (
    Numbers,
    NumberStream,
    flat,
    peek,
    plan_from_pool,
    same_walk,
    targets_by_fold,
    walk,
)


def score(inputs, targets):
    return 1.0 + targets.double(), 10.0 * targets


LOADER = DataLoader(Numbers(40), batch_size=6, shuffle=True)


def test_scores_belong_to_their_samples():
    pool = torch.tensor([9, 3, 30])
    scores = score_pool(Supply.of(DataLoader(Numbers(40), batch_size=2)), pool, score)
    assert scores.scores.tolist() == [10, 4, 31]
    assert scores.losses.tolist() == [90, 30, 300]
    assert scores.scores.dtype == torch.float64


@pytest.mark.parametrize("symmetric", [True, False])
def test_plan_carries_the_draws_of_its_pool(symmetric):
    plan = plan_from_pool(LOADER, score, folds=2, n_samples=14, symmetric=symmetric)
    found = targets_by_fold(plan)
    assert plan.fold_sizes == (7, 7) == tuple(map(len, found))
    assert not set(found[0]) & set(found[1])
    assert [i.tolist() for i in plan.indices] == [sorted(set(f)) for f in found]
    assert (plan.n_data, plan.population) == (40, 40)
    q = sampling_probabilities(1.0 + torch.arange(40).double(), EPSILON)
    for batch in plan.batches():
        assert torch.allclose(batch.weights, 1 / (40 * q[batch.targets]), rtol=1e-12)
    unseen = [1 - float(q[list(set(f))].sum()) for f in found]
    assert plan.unseen_mass == pytest.approx(unseen, rel=1e-12)
    assert same_walk(walk(plan), walk(plan))


def test_draws_follow_curvature():
    plan = plan_from_pool(
        LOADER, lambda x, y: ((y == 7).double(), y), folds=1, n_samples=20, symmetric=True
    )
    assert targets_by_fold(plan)[0].count(7) > 10
    assert plan.n_samples < 20


def test_equal_curvature_is_drawn_uniformly_without_replacement():
    plan = plan_from_pool(
        LOADER, lambda x, y: (torch.full((len(y),), 3.0), y), folds=2, n_samples=40, symmetric=False
    )
    assert plan.n_samples == 40
    assert all(bool((batch.weights == 1).all()) for batch in plan.batches())


def test_pool_is_capped_to_a_subset_of_the_samplers_indices():
    part = list(range(0, 40, 2))
    loader = DataLoader(Numbers(40), batch_size=6, sampler=SubsetRandomSampler(part))
    plans = [
        plan_from_pool(loader, score, folds=2, n_samples=4, symmetric=True, pool_size=9, seed=seed)
        for seed in (0, 1)
    ]
    for plan in plans:
        assert (plan.population, plan.pool_size, len(plan.pool)) == (40, 9, 9)
        assert set(plan.pool.indices.tolist()) <= set(part)
        assert set(flat(targets_by_fold(plan))) <= set(plan.pool.indices.tolist())
        assert plan.n_data == 40
    assert not torch.equal(plans[0].pool.indices, plans[1].pool.indices)


def test_excluded_samples_leave_the_pool():
    plan = plan_from_pool(
        LOADER, score, folds=1, n_samples=4, symmetric=True, exclude=frozenset(range(30))
    )
    assert plan.pool.indices.tolist() == list(range(30, 40))
    assert plan.population == 10


def test_random_state_is_untouched():
    before = peek()
    loader = DataLoader(Numbers(12, noisy=True), batch_size=6, shuffle=True)
    walk(plan_from_pool(loader, score, folds=2, n_samples=6, symmetric=True))
    assert peek() == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x, y: (y.double() * float("nan"), y), "not finite"),
        (lambda x, y: (y.double() + float("inf"), y), "not finite"),
    ],
)
def test_bad_scores_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        plan_from_pool(LOADER, bad, folds=1, n_samples=3, symmetric=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_samples": 41}, ValueError, "n_samples=41 exceeds"),
        ({"n_samples": None}, TypeError, "n_samples must be a positive integer"),
        ({"pool_size": 3}, ValueError, "pool_size=3 is smaller than n_samples=5"),
        ({"folds": 9}, ValueError, "too few for 9 folds"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    arguments = {"folds": 2, "n_samples": 5, "symmetric": True} | arguments
    with pytest.raises(error, match=message):
        plan_from_pool(LOADER, score, **arguments)


def test_stream_has_no_pool():
    with pytest.raises(ValueError, match="map-style dataset"):
        plan_from_pool(
            DataLoader(NumberStream(9)), score, folds=1, n_samples=3, n_data=9, symmetric=True
        )


def test_pool_grows_with_the_spread_of_scores_and_with_the_budget():
    # c² = 3 and m = 256: (c²/M)(1 − M/P) = 1/4 · 1/8 / 256.
    scores = torch.tensor([0.0] * 3 + [1.0]).repeat(1_000).double()
    spread = float(scores.var() / scores.mean() ** 2)
    for available in (3_000, 5_000):
        size = useful_pool_size(scores, 256, available)
        added = spread / size * (1 - size / available)
        assert added <= 0.25 * 0.125 / 256 < spread / (size - 1) * (1 - (size - 1) / available)
    assert useful_pool_size(scores, 8, 10**6) == 64 * 8
    assert useful_pool_size(scores, 32, 10**6) == 64 * 32
    assert useful_pool_size(scores, 256, 10**6) == MAX_POOL_SIZE
    assert useful_pool_size(scores, 10**4, 10**6) == 10**4
    assert useful_pool_size(torch.ones(50).double(), 8, 10**6) == 4 * 8
    assert useful_pool_size(torch.zeros(50).double(), 8, 10**6) == 4 * 8


def counted_score(seen):
    def score(inputs, targets):
        seen.append(targets)
        return 1.0 + (targets % 7).double(), targets

    return score


def test_small_data_sets_are_scored_whole_and_large_ones_in_part():
    for n, budget, scored in ((300, 10, 300), (5_000, 10, None)):
        seen: list = []
        loader = DataLoader(Numbers(n), batch_size=500)
        plan = plan_from_pool(
            loader, counted_score(seen), folds=2, n_samples=budget, symmetric=True
        )
        total = torch.cat(seen)
        assert len(torch.unique(total)) == len(total)
        if scored is not None:
            assert len(plan.pool) == len(total) == scored
        else:
            # The pilot sample stays out of the pool, which stands for it as well.
            assert 40 <= len(plan.pool) == len(total) - 40 < 700
            assert plan.population == n


def test_choosing_the_size_of_the_pool_by_scores_leaves_it_unbiased(monkeypatch):
    # Every order of 7 samples: a pilot of 2, then a pool of 1 to 5 as the pilot's scores say.
    h = torch.tensor([0.1, 0.1, 0.2, 0.5, 1.0, 3.0, 9.0]).double()
    loader = DataLoader(Numbers(7), batch_size=7)
    supply = Supply.of(loader, n_samples=1)
    for name, value in {"_WHOLE": 1, "_PILOT": 2, "_LEAST_PILOT": 2, "_FEWEST": 1}.items():
        monkeypatch.setattr(pool_module, name, value)
    monkeypatch.setattr(pool_module, "_TOLERATED", 2.0)
    means, with_pilot, sizes = [], [], set()
    for order in itertools.permutations(range(7)):
        monkeypatch.setattr(torch, "randperm", lambda n, generator, o=order: torch.tensor(o))
        pool = pool_module._pool(
            supply, None, lambda indices: PoolScores(indices, h[indices], h[indices])
        )
        sizes.add(len(pool))
        means.append(float(h[pool].mean()))
        with_pilot.append(float(h[[*order[:2], *pool.tolist()]].mean()))
    assert len(sizes) > 2
    assert sum(means) / len(means) == pytest.approx(float(h.mean()), rel=1e-12)
    assert abs(sum(with_pilot) / len(means) - float(h.mean())) > 0.02
