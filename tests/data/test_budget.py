"""Plans that draw a budget from a loader."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laplace.utils import SoDSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from laplace_debiased.data.keys import Keys
from tests.data.toys import (
    Numbers,
    NumberStream,
    flat,
    peek,
    plan_from_loader,
    same_walk,
    targets_by_fold,
    walk,
)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n=st.integers(1, 40), folds=st.integers(1, 5), seed=st.integers(0, 9))
def test_budget_gives_disjoint_balanced_repeatable_folds(data, n, folds, seed):
    m = data.draw(st.integers(1, n))
    loader = DataLoader(Numbers(n), batch_size=7, shuffle=True)
    if m < folds:
        with pytest.raises(ValueError, match=f"n_samples={m} is too few for {folds} folds"):
            plan_from_loader(loader, folds=folds, n_samples=m, seed=seed)
        return
    plan = plan_from_loader(loader, folds=folds, n_samples=m, seed=seed)
    found = targets_by_fold(plan)
    assert len(set(flat(found))) == len(flat(found)) == plan.n_samples == m
    assert tuple(map(len, found)) == plan.fold_sizes
    assert max(plan.fold_sizes) - min(plan.fold_sizes) <= 1
    assert (plan.population, plan.n_data) == (n, n)
    assert [i.tolist() for i in plan.indices] == [sorted(f) for f in found]
    again = plan_from_loader(loader, folds=folds, n_samples=m, seed=seed)
    assert same_walk(walk(plan), walk(again))
    assert same_walk(walk(plan), walk(plan))


def test_each_sample_is_drawn_equally_often():
    # 400 seeds, 3 of 6: each count is Binomial(400, 1/2), sd 10; 4.5 sd over 6 samples and 2
    # folds has an error rate below 1e-4.
    loader = DataLoader(Numbers(6), batch_size=6)
    seen = torch.zeros(2, 6)
    for seed in range(400):
        plan = plan_from_loader(loader, folds=2, n_samples=4, seed=seed)
        for k, indices in enumerate(plan.indices):
            seen[k, indices] += 1
    assert torch.all((seen - 400 / 3).abs() < 4.5 * (400 * 2 / 9) ** 0.5)


def test_seed_decides_the_draw():
    loader = DataLoader(Numbers(100), batch_size=8)
    drawn = [plan_from_loader(loader, folds=1, n_samples=10, seed=s).indices[0] for s in (0, 1)]
    assert not torch.equal(*drawn)


PART = [2, 3, 5, 7, 11]
SAMPLERS = {
    "subset random": SubsetRandomSampler(PART),
    "indices": type("Own", (Sampler,), {"indices": np.array(PART), "__iter__": None})(),
    "negative": SubsetRandomSampler([*PART[:-1], -9]),
    "repeated": SubsetRandomSampler(PART + PART),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_budget_is_drawn_from_the_samplers_indices_and_n_is_the_datasets(kind):
    loader = DataLoader(Numbers(20), batch_size=2, sampler=SAMPLERS[kind])
    plan = plan_from_loader(loader, folds=2, n_samples=5)
    assert sorted(flat(targets_by_fold(plan))) == PART
    assert sorted(torch.cat(plan.indices).tolist()) == PART
    assert (plan.n_data, plan.population, plan.pool_size) == (20, 20, 5)
    with pytest.raises(ValueError, match="n_samples=6 exceeds the 5 samples"):
        plan_from_loader(loader, folds=2, n_samples=6)


def test_laplace_torchs_subset_of_data_sampler_is_known():
    sampler = SoDSampler(N=30, M=6, seed=1)
    plan = plan_from_loader(DataLoader(Numbers(30), sampler=sampler), folds=1, n_samples=6)
    assert sorted(targets_by_fold(plan)[0]) == sorted(sampler.indices.tolist())


def test_known_samplers_without_indices_stand_for_their_data_source():
    data = Numbers(9)
    for sampler in (
        SequentialSampler(data),
        RandomSampler(data),
        RandomSampler(data, num_samples=4),
    ):
        plan = plan_from_loader(DataLoader(data, sampler=sampler), folds=1, n_samples=9)
        assert sorted(targets_by_fold(plan)[0]) == list(range(9))


def test_batch_sampler_tells_the_indices_not_the_unused_sampler():
    batches = BatchSampler(SubsetRandomSampler(PART), 3, drop_last=True)
    loader = DataLoader(Numbers(20), batch_sampler=batches)
    plan = plan_from_loader(loader, folds=1, n_samples=5)
    assert sorted(targets_by_fold(plan)[0]) == PART
    assert [len(b) for b in walk(plan)] == [3, 2]


class Unknown(Sampler):
    def __iter__(self):
        return iter(range(5))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Numbers(9), sampler=WeightedRandomSampler([1.0] * 9, 9)),
        DataLoader(Numbers(9), sampler=RandomSampler(range(9), replacement=True)),
        DataLoader(Numbers(9), sampler=Unknown()),
        DataLoader(Numbers(9), batch_sampler=[[0, 1], [2]]),
    ],
    ids=["weighted", "replacement", "unknown", "batches"],
)
def test_sampler_that_hides_its_indices_is_refused_with_a_remedy(loader):
    with pytest.raises(ValueError, match=r"Subset\(dataset, indices\).*n_samples=None"):
        plan_from_loader(loader, folds=1, n_samples=2)


@pytest.mark.parametrize(
    "loader",
    [DataLoader(NumberStream(9)), list(DataLoader(Numbers(9)))],
    ids=["iterable", "list"],
)
def test_budget_from_a_stream_is_refused_with_a_remedy(loader):
    with pytest.raises(ValueError, match=r"map-style dataset.*n_samples=None"):
        plan_from_loader(loader, folds=1, n_samples=2, n_data=9)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(True, TypeError), (2.0, TypeError), ("3", TypeError), (0, ValueError), (-4, ValueError)],
)
@pytest.mark.parametrize("name", ["n_samples", "n_data"])
def test_bad_counts_are_named(name, bad, error):
    arguments = {"folds": 2, "n_samples": 4, name: bad}
    with pytest.raises(error, match=f"^{name} must be"):
        plan_from_loader(DataLoader(Numbers(9)), **arguments)


def test_integers_of_numpy_and_torch_are_integers():
    plan = plan_from_loader(
        DataLoader(Numbers(9)), folds=1, n_samples=np.int64(4), n_data=torch.tensor(50)
    )
    assert (plan.n_samples, plan.n_data) == (4, 50)


def test_budget_over_n_is_refused():
    loader = DataLoader(Numbers(9))
    with pytest.raises(ValueError, match=r"n_samples=10 exceeds the size of the training set \(9"):
        plan_from_loader(loader, folds=1, n_samples=10)
    with pytest.raises(ValueError, match="n_samples=5 exceeds"):
        plan_from_loader(loader, folds=1, n_samples=5, n_data=4)


def test_excluded_samples_are_not_drawn_again():
    loader = DataLoader(Numbers(10), batch_size=4)
    first = plan_from_loader(loader, folds=2, n_samples=4)
    drawn = frozenset(torch.cat(first.indices).tolist())
    second = plan_from_loader(loader, folds=2, n_samples=6, exclude=drawn)
    assert frozenset(torch.cat(second.indices).tolist()) == frozenset(range(10)) - drawn
    assert (second.population, second.n_data) == (6, 10)
    with pytest.raises(ValueError, match=r"exceeds the 6 samples.*after 4 excluded"):
        plan_from_loader(loader, folds=2, n_samples=7, exclude=drawn)


def test_collate_fn_is_honoured_and_must_keep_every_sample():
    def as_dict(samples):
        return {
            "x": torch.stack([x for x, _ in samples]),
            "y": torch.tensor([y for _, y in samples]),
        }

    loader = DataLoader(Numbers(10), batch_size=4, collate_fn=as_dict)
    plan = plan_from_loader(loader, folds=1, n_samples=6, keys=Keys("y"))
    for batch in walk(plan):
        assert set(batch.inputs) == {"x", "y"}
        assert torch.equal(batch.inputs["x"][:, 0], batch.targets.float())

    def drops_odd(samples):
        kept = [(x, y) for x, y in samples if y % 2 == 0]
        return torch.stack([x for x, _ in kept]), torch.tensor([y for _, y in kept])

    plan = plan_from_loader(DataLoader(Numbers(10), batch_size=10, collate_fn=drops_odd), folds=1)
    with pytest.raises(ValueError, match="collate_fn returned 5 targets for 10 samples"):
        walk(plan)


def test_worker_process_gives_the_same_samples():
    plans = [
        plan_from_loader(DataLoader(Numbers(9), batch_size=2, num_workers=w), folds=2, n_samples=5)
        for w in (0, 1)
    ]
    assert same_walk(*map(walk, plans))


def test_random_state_is_untouched_by_building_and_walking():
    before = peek()
    plan = plan_from_loader(
        DataLoader(Numbers(9, noisy=True), shuffle=True), folds=2, n_samples=5, seed=3
    )
    walk(plan)
    assert peek() == before


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3, 3, 1]), (5, [5, 2]), (50, [7])])
def test_batches_are_full_and_may_mix_folds(batch_size, sizes):
    loader = DataLoader(Numbers(10), batch_size=batch_size)
    plan = plan_from_loader(loader, folds=2, n_samples=7)
    assert [len(b) for b in walk(plan)] == sizes
    assert len(plan) == len(sizes)


def test_inner_loader_takes_a_dataset_that_reads_batches_at_once():
    class Bulk(TensorDataset):
        def __getitems__(self, indices):
            asked.append(len(indices))
            return [self[i] for i in indices]

    asked: list[int] = []
    data = Bulk(torch.zeros(10, 2), torch.arange(10))
    walk(plan_from_loader(DataLoader(data, batch_size=4), folds=1, n_samples=6))
    assert asked == [4, 2]


def test_budget_from_a_subset_counts_the_subset():
    loader = DataLoader(Subset(Numbers(20), PART), batch_size=2)
    plan = plan_from_loader(loader, folds=1, n_samples=5)
    assert (plan.n_data, plan.population) == (5, 5)
    assert sorted(targets_by_fold(plan)[0]) == PART
    assert plan.indices[0].tolist() == [0, 1, 2, 3, 4]
