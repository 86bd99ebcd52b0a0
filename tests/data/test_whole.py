"""Plans over everything that a loader yields."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

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

LOADERS = {
    "sequential": lambda n: DataLoader(Numbers(n), batch_size=4),
    "shuffled": lambda n: DataLoader(Numbers(n), batch_size=4, shuffle=True),
    "iterable": lambda n: DataLoader(NumberStream(n), batch_size=4),
    "list": lambda n: list(DataLoader(Numbers(n), batch_size=4)),
}


@pytest.mark.parametrize("kind", LOADERS)
@settings(max_examples=10, deadline=None)
@given(n=st.integers(1, 30), folds=st.integers(1, 4), seed=st.integers(-5, 2**66))
def test_folds_are_disjoint_exhaustive_balanced_and_repeatable(kind, n, folds, seed):
    if n < folds:
        return
    loader = LOADERS[kind](n)
    plan = plan_from_loader(loader, folds=folds, n_data=n, seed=seed)
    found = targets_by_fold(plan)
    assert sorted(flat(found)) == list(range(n))
    assert tuple(map(len, found)) == plan.fold_sizes
    assert max(plan.fold_sizes) - min(plan.fold_sizes) <= 1
    assert (plan.n_samples, plan.population, len(plan)) == (n, n, -(-n // 4))
    assert plan.unseen_mass == pytest.approx([1 - m / n for m in plan.fold_sizes], abs=1e-12)
    again = plan_from_loader(loader, folds=folds, n_data=n, seed=seed)
    assert same_walk(walk(plan), walk(plan))
    assert same_walk(walk(plan), walk(again))


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 40), share=st.floats(0.05, 0.95), kind=st.sampled_from(list(LOADERS)))
def test_fractions_are_met_to_a_sample(n, share, kind):
    plan = plan_from_loader(LOADERS[kind](n), folds=2, fractions=(share, 1 - share), n_data=n)
    assert plan.fold_sizes[0] == pytest.approx(min(max(n * share, 1), n - 1), abs=1)
    assert tuple(map(len, targets_by_fold(plan))) == plan.fold_sizes


@pytest.mark.parametrize("folds", [2, 3])
def test_another_seed_gives_another_split(folds):
    loader = DataLoader(Numbers(40), batch_size=8)
    splits = [
        [set(f) for f in targets_by_fold(plan_from_loader(loader, folds=folds, seed=seed))]
        for seed in (0, 1)
    ]
    assert splits[0] != splits[1]


def test_one_fold_is_the_loaders_own_batches():
    loader = DataLoader(Numbers(11), batch_size=4, drop_last=True)
    got = walk(plan_from_loader(loader, folds=1))
    own = list(loader)
    assert [b.targets.tolist() for b in got] == [y.tolist() for _, y in own]
    assert all(torch.equal(b.inputs, x) for b, (x, _) in zip(got, own, strict=True))


def test_drop_last_and_sampler_give_a_sample_of_the_training_set_behind_them():
    data = Numbers(11)
    dropping = plan_from_loader(DataLoader(data, batch_size=4, drop_last=True), folds=2)
    assert (dropping.n_data, dropping.population, dropping.pool_size) == (11, 11, 8)
    part = plan_from_loader(
        DataLoader(data, sampler=torch.utils.data.SubsetRandomSampler([1, 5, 7])), folds=1
    )
    assert (part.n_data, part.population, part.pool_size) == (11, 11, 3)
    assert sorted(targets_by_fold(part)[0]) == [1, 5, 7]
    subset = plan_from_loader(DataLoader(Subset(data, [1, 5, 7])), folds=1)
    assert (subset.n_data, subset.population, subset.pool_size) == (3, 3, 3)
    drawn = plan_from_loader(DataLoader(Subset(data, [1, 5, 7])), folds=2, n_data=11)
    assert (drawn.n_data, drawn.population, drawn.pool_size) == (11, 11, 3)
    few = plan_from_loader(DataLoader(data), folds=2, n_data=4)
    assert (few.n_data, few.population) == (4, 11)


def test_repeats_of_a_sample_share_its_fold():
    sampler = WeightedRandomSampler([5.0, 1, 1, 1, 1, 1, 1, 1], 40)
    plan = plan_from_loader(DataLoader(Numbers(8), batch_size=16, sampler=sampler), folds=2)
    first, second = targets_by_fold(plan)
    assert len(first) + len(second) == 40
    assert len(set(first)) < len(first)
    assert not set(first) & set(second)
    assert sum(plan.unseen_mass) == pytest.approx(1)


def test_custom_batch_sampler_keeps_its_composition():
    sampler = [[3, 1], [0], [2, 5, 4]]
    plan = plan_from_loader(DataLoader(Numbers(6), batch_sampler=sampler), folds=2)
    assert [b.targets.tolist() for b in walk(plan)] == sampler


def test_negative_indices_name_the_same_sample():
    plan = plan_from_loader(DataLoader(Numbers(4), batch_sampler=[[-1, 0], [3, 1]]), folds=2)
    found = targets_by_fold(plan)
    assert sorted(flat(found)) == [0, 1, 3, 3]
    assert not set(found[0]) & set(found[1])


def test_batch_size_changes_neither_samples_nor_folds():
    loaders = [DataLoader(Numbers(13), batch_size=b, shuffle=True) for b in (4, 7)]
    narrow, wide = (plan_from_loader(loader, folds=3) for loader in loaders)
    assert [len(b) for b in walk(wide)] == [7, 6]
    assert targets_by_fold(narrow) == targets_by_fold(wide)


@pytest.mark.parametrize("workers", [0, 1])
def test_augmentations_are_the_same_at_each_walk_whatever_the_consumer_draws(workers):
    data = Numbers(6, noisy=True)
    plan = plan_from_loader(
        DataLoader(data, batch_size=4, shuffle=True, num_workers=workers), folds=2
    )
    quiet = walk(plan)
    before = peek()
    noisy = []
    for batch in plan.batches():
        noisy.append(batch)
        assert peek() == before
        torch.manual_seed(len(noisy))
        np.random.seed(1)
        before = peek()
    assert same_walk(quiet, noisy)
    assert (
        len({float(x[0] - y) for b in quiet for x, y in zip(b.inputs, b.targets, strict=True)}) == 6
    )


def test_persistent_workers_of_the_user_are_not_touched():
    class NoisyStream(NumberStream):
        def __iter__(self):
            return ((x + torch.rand(3), y) for x, y in super().__iter__())

    loader = DataLoader(NoisyStream(6), batch_size=4, num_workers=1, persistent_workers=True)
    plan = plan_from_loader(loader, folds=2, n_data=6)
    assert same_walk(walk(plan), walk(plan))
    assert loader._iterator is None


def test_early_stop_leaves_the_random_state_and_the_loaders_generator_alone():
    own = torch.Generator().manual_seed(5)
    loader = DataLoader(Numbers(9, noisy=True), batch_size=2, shuffle=True, generator=own)
    before, state = peek(), own.get_state()
    plan = plan_from_loader(loader, folds=2)
    for _ in plan.batches():
        break
    assert peek() == before
    assert torch.equal(own.get_state(), state)


@pytest.mark.parametrize("indexable", [True, False])
def test_an_exception_half_way_passes_unchanged_and_restores_the_random_state(indexable):
    class Broken(Numbers):
        fuse = 100

        def __getitem__(self, i):
            self.fuse -= 1
            if self.fuse < 0:
                raise KeyError("disk gone")
            return super().__getitem__(i)

    data = Broken(10, noisy=True)
    loader = DataLoader(data, batch_size=2)
    if not indexable:

        class Custom:
            dataset = data

            def __iter__(self):
                return iter(loader)

    plan = plan_from_loader(loader if indexable else Custom(), folds=2)
    before = peek()
    data.fuse = 5
    with pytest.raises(KeyError, match="disk gone"):
        walk(plan)
    assert peek() == before


def test_a_subclass_with_its_own_walk_is_walked_its_own_way():
    class Doubled(DataLoader):
        def __iter__(self):
            return ((2 * x, y) for x, y in super().__iter__())

    plan = plan_from_loader(Doubled(Numbers(6), batch_size=4), folds=2)
    assert plan.indices is None
    assert all(torch.equal(b.inputs[:, 0], 2.0 * b.targets) for b in walk(plan))


def test_a_stream_in_a_new_order_is_refused_when_split_and_taken_whole_when_not():
    loader = DataLoader(NumberStream(20, restless=True), batch_size=6)
    with pytest.raises(RuntimeError, match=r"unshuffled loader.*magnitude_loader"):
        walk(plan_from_loader(loader, folds=2, n_data=20))
    whole = plan_from_loader(loader, folds=1, n_data=20)
    assert sorted(targets_by_fold(whole)[0]) == list(range(20))


@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_a_stream_of_another_length_is_refused(folds, change):
    batches = list(DataLoader(Numbers(6), batch_size=1))
    plan = plan_from_loader(batches, folds=folds, n_data=6)
    walk(plan)
    batches[:] = (batches + batches)[: 6 + change]
    with pytest.raises(RuntimeError, match="changed between two walks"):
        walk(plan)


def test_a_stream_that_every_worker_repeats_is_warned_about():
    with pytest.warns(UserWarning, match=r"gives 20 samples.*\(N=10\).*get_worker_info"):
        plan_from_loader(DataLoader(NumberStream(10), num_workers=2), folds=2, n_data=10)


def test_a_shuffled_stream_repeats_by_seed():
    class Shuffled:
        def __iter__(self):
            return iter([(torch.zeros(1, 3), torch.tensor([i])) for i in np.random.permutation(30)])

    plan = plan_from_loader(Shuffled(), folds=2, n_data=30)
    assert same_walk(walk(plan), walk(plan))


def test_keys_that_are_no_integers_are_walked_as_a_stream():
    class Named(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return torch.zeros(2), torch.tensor(ord(key))

    loader = DataLoader(Named(), batch_size=2, sampler=list("abc"))
    plan = plan_from_loader(loader, folds=1, n_data=3)
    assert targets_by_fold(plan) == [[97, 98, 99]]


def test_batch_size_none_hands_ready_batches_through():
    ready = [(torch.zeros(3, 2), torch.arange(3)), (torch.zeros(1, 2), torch.tensor([3]))]
    plan = plan_from_loader(DataLoader(ready, batch_size=None), folds=2, n_data=4)
    assert targets_by_fold(plan) == [[0, 2], [1, 3]]


def test_unused_default_sampler_beside_a_batch_sampler_is_ignored():
    batches = BatchSampler(SequentialSampler(range(3)), 2, drop_last=False)
    plan = plan_from_loader(DataLoader(Numbers(9), batch_sampler=batches), folds=1)
    assert targets_by_fold(plan) == [[0, 1, 2]]
    replaced = RandomSampler(range(3), replacement=True, num_samples=50)
    plan = plan_from_loader(DataLoader(Numbers(9), batch_size=10, sampler=replaced), folds=3)
    assert [len(set(fold)) for fold in targets_by_fold(plan)] == [1, 1, 1]
