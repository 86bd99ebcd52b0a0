"""Plans that sample where curvature is."""

import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler

from laplace_debiased.data import plan_from_pool, sampling_probabilities, score_pool
from tests.data.toys import Numbers, NumberStream, flat, peek, same_walk, targets_by_fold, walk


def score(inputs, targets):
    return 1.0 + targets.double(), 10.0 * targets


LOADER = DataLoader(Numbers(40), batch_size=6, shuffle=True)


def test_scores_belong_to_their_samples():
    pool = torch.tensor([9, 3, 30])
    scores = score_pool(LOADER, pool, score, batch_size=2)
    assert scores.h.tolist() == [10, 4, 31]
    assert scores.losses.tolist() == [90, 30, 300]
    assert scores.h.dtype == torch.float64


@pytest.mark.parametrize("symmetric", [True, False])
def test_plan_carries_the_draws_of_its_pool(symmetric):
    plan = plan_from_pool(LOADER, score, folds=2, n_samples=14, symmetric=symmetric, epsilon=0.2)
    found = targets_by_fold(plan)
    assert plan.fold_sizes == (7, 7) == tuple(map(len, found))
    assert not set(found[0]) & set(found[1])
    assert [i.tolist() for i in plan.indices] == [sorted(set(f)) for f in found]
    assert (plan.n_data, plan.population) == (40, 40)
    q = sampling_probabilities(1.0 + torch.arange(40).double(), 0.2)
    for batch in plan.batches():
        assert torch.allclose(batch.weights, 1 / (40 * q[batch.targets]), rtol=1e-12)
    unseen = [1 - float(q[list(set(f))].sum()) for f in found]
    assert plan.unseen_mass == pytest.approx(unseen, rel=1e-12)
    assert plan.held_out_folds == (None if symmetric else {1})
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
    assert not plan.is_weighted
    assert plan.held_out_folds is None


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
        (lambda x, y: (y[:1].double(), y), "one per sample"),
        (lambda x, y: (y.double(), y.double().mean()), "one per sample"),
        (lambda x, y: (y.double() * float("nan"), y), "not finite"),
        (lambda x, y: (-1.0 - y, y), "negative"),
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
        ({"pool_size": 3.5}, TypeError, "pool_size must be a positive integer"),
        ({"epsilon": 0.0}, ValueError, "epsilon"),
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
