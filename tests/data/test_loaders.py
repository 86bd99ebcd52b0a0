"""Two explicit loaders, the size of the data, and what a loader may not be."""

from collections import UserDict

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset, SubsetRandomSampler

from laplace_debiased.data.build import plan_from_two_loaders
from laplace_debiased.data.loaders import loader_length, split_batch
from tests.data.toys import (
    Numbers,
    NumberStream,
    plan_from_loader,
    same_walk,
    targets_by_fold,
    walk,
)

DATA = Numbers(20)


def subset_loader(indices, **arguments):
    return DataLoader(Subset(DATA, indices), batch_size=3, **arguments)


@pytest.mark.filterwarnings("error")
def test_two_loaders_are_walked_whole_as_two_folds():
    plan = plan_from_two_loaders(
        subset_loader(range(8), shuffle=True), subset_loader(range(8, 13)), n_data=20
    )
    first, second = targets_by_fold(plan)
    assert (sorted(first), second) == (list(range(8)), list(range(8, 13)))
    assert (plan.fold_sizes, plan.n_data, len(plan)) == ((8, 5), 20, 5)
    assert plan.population is None
    assert plan.unseen_mass is None
    assert same_walk(walk(plan), walk(plan))


@pytest.mark.filterwarnings("error")
def test_one_dataset_with_two_samplers_needs_no_n_data():
    plan = plan_from_two_loaders(
        DataLoader(DATA, sampler=SubsetRandomSampler([0, 1, 2])),
        DataLoader(DATA, sampler=SubsetRandomSampler([3, 4])),
    )
    assert (plan.n_data, plan.fold_sizes) == (20, (3, 2))


@pytest.mark.filterwarnings("ignore:loader and magnitude_loader share")
def test_two_random_samplers_do_not_draw_the_same_samples():
    loaders = [DataLoader(DATA, sampler=RandomSampler(DATA, num_samples=8)) for _ in range(2)]
    first, second = targets_by_fold(plan_from_two_loaders(*loaders))
    assert set(first) != set(second)


@pytest.mark.parametrize(
    ("loader", "other"),
    [
        (subset_loader([0, 1]), subset_loader([2, 3])),
        ([(torch.zeros(2, 1), torch.zeros(2))], [(torch.zeros(2, 1), torch.zeros(2))]),
    ],
    ids=["subsets", "lists"],
)
def test_n_data_is_required_without_a_shared_dataset(loader, other):
    with pytest.raises(ValueError, match="pass n_data"):
        plan_from_two_loaders(loader, other)


STREAM = NumberStream(6)
SAME = DataLoader(DATA, batch_size=4, shuffle=True)
LISTED = list(DataLoader(Numbers(6), batch_size=4))


@pytest.mark.parametrize(
    ("loader", "other", "count"),
    [
        (subset_loader([0, 1, 2, 3]), subset_loader([3, 2, 8]), 2),
        (DataLoader(Subset(Subset(DATA, [4, 5, 6, 7]), [1, -1])), subset_loader([7, 9]), 1),
        (subset_loader([3, 4]), DataLoader(DATA, sampler=SubsetRandomSampler([4, 5])), 1),
        (SAME, SAME, 20),
        (SAME, DataLoader(DATA, batch_size=5), 20),
        (LISTED, LISTED, 6),
        (DataLoader(STREAM, batch_size=2), DataLoader(STREAM, batch_size=3), 6),
    ],
    ids=["subsets", "nested", "sampler", "same loader", "same dataset", "list", "stream"],
)
def test_overlap_warns_with_its_count(loader, other, count):
    with pytest.warns(UserWarning, match=f"share {count} samples"):
        plan_from_two_loaders(loader, other, n_data=20)


@pytest.mark.filterwarnings("error")
def test_equal_indices_into_different_data_are_no_overlap():
    plan_from_two_loaders(DataLoader(Numbers(4)), DataLoader(Numbers(4)), n_data=8)


@pytest.mark.filterwarnings("error")
def test_streams_of_different_data_can_be_mixed_with_indices():
    plan = plan_from_two_loaders(DataLoader(NumberStream(5), batch_size=2), SAME, n_data=25)
    assert plan.indices is None
    assert plan.fold_sizes == (5, 20)
    assert [sorted(f) for f in targets_by_fold(plan)] == [list(range(5)), list(range(20))]


def test_size_is_the_datasets_unless_given():
    assert loader_length(DataLoader(DATA, batch_size=3, drop_last=True)) == 20
    assert loader_length(subset_loader([1, 2])) == 2
    assert loader_length(DataLoader(NumberStream(3)), 77) == 77


@pytest.mark.parametrize("loader", [DataLoader(NumberStream(3)), [1, 2]], ids=["iterable", "list"])
def test_unknown_size_asks_for_n_data(loader):
    with pytest.raises(ValueError, match="pass n_data"):
        loader_length(loader)


@pytest.mark.parametrize(
    "loader",
    [
        [],
        DataLoader(Numbers(0)),
        DataLoader(Numbers(3), batch_size=4, drop_last=True),
        DataLoader(NumberStream(0)),
        [(torch.zeros(0, 2), torch.zeros(0))],
        DataLoader(Numbers(3), batch_sampler=[]),
    ],
    ids=["list", "dataset", "dropped", "stream", "empty batch", "no batch"],
)
def test_empty_loader_is_refused(loader):
    with pytest.raises(ValueError, match="empty"):
        plan_from_loader(loader, folds=1, n_data=3)


def test_empty_magnitude_loader_is_named():
    with pytest.raises(ValueError, match="magnitude_loader is empty"):
        plan_from_two_loaders(SAME, [], n_data=3)


def test_empty_batches_within_a_stream_are_harmless():
    full = (torch.zeros(2, 1), torch.arange(2))
    plan = plan_from_loader([full, (torch.zeros(0, 1), torch.arange(0)), full], folds=2, n_data=4)
    assert targets_by_fold(plan) == [[0, 0], [1, 1]]


@pytest.mark.parametrize("loader", [iter([1]), (b for b in [1]), 3, None])
def test_what_cannot_be_walked_twice_is_refused(loader):
    with pytest.raises(TypeError, match=r"^(loader) (is an iterator|must be a DataLoader)"):
        plan_from_loader(loader, folds=1)
    with pytest.raises(TypeError, match=r"^magnitude_loader"):
        plan_from_two_loaders(SAME, loader, n_data=3)


Y = torch.arange(3)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (Y, TypeError, "got Tensor"),
        ((Y, Y, Y), TypeError, "got tuple of length 3"),
        ([Y], TypeError, "got list of length 1"),
        ((Y, [0, 1, 2]), TypeError, "targets .* got list"),
        ((Y, torch.tensor(1)), TypeError, "scalar tensor"),
        ({"x": Y, "y": Y}, ValueError, r"dict_key_y='labels'; they have \['x', 'y'\]"),
        ((torch.zeros(4, 2), Y), ValueError, "first dimensions must agree"),
    ],
)
def test_odd_batches_are_refused_with_what_they_were(batch, error, message):
    with pytest.raises(error, match=message):
        split_batch(batch)
    with pytest.raises(error, match=message):
        plan_from_loader([batch], folds=1, n_data=3)


def test_mapping_is_the_input_as_a_whole():
    batch = UserDict({"ids": torch.zeros(3, 4), "labels": Y})
    inputs, targets = split_batch(batch)
    assert inputs is batch
    assert targets is Y
    pair = ({"ids": torch.zeros(3, 4)}, Y)
    assert split_batch(pair)[0] is pair[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.float64])
def test_targets_of_any_type_are_checked(dtype):
    ones, zeros = torch.ones(2, 1).to(dtype), torch.zeros(2, 1).to(dtype)
    batches = [(torch.zeros(2, 1), ones), (torch.zeros(2, 1), zeros)]
    plan = plan_from_loader(batches, folds=2, n_data=4)
    walk(plan)
    batches.reverse()
    with pytest.raises(RuntimeError, match="changed between two walks"):
        walk(plan)
