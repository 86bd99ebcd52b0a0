"""What ``n_samples="auto"`` stands for."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature import MagnitudeAccumulator
from laplace_debiased.estimation.arguments import FitRequest
from laplace_debiased.estimation.kron import RECOMMENDED_SAMPLES, KronStructure
from laplace_debiased.estimation.plan import supply_for


def dataset(n: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 3, generator=generator), torch.arange(n) % 2)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset(5))


def auto(loader: object, *, elsewhere: bool = False) -> int | None:
    la = DebiasedLaplace(torch.nn.Linear(3, 2))
    request = FitRequest(loader, override=not elsewhere)
    structure = KronStructure(la.arguments)
    return structure.recommended_samples(structure.engine(la._target, la.coverage), request, None)


def test_auto_is_a_budget_where_the_data_are_more_than_that():
    assert auto(DataLoader(dataset(RECOMMENDED_SAMPLES + 1))) == RECOMMENDED_SAMPLES
    assert auto(DataLoader(dataset(RECOMMENDED_SAMPLES))) is None


def test_auto_counts_what_the_sampler_draws_from():
    few = Subset(dataset(1000), range(100))
    assert auto(DataLoader(few)) is None


def test_auto_walks_what_cannot_be_drawn_from():
    assert auto(DataLoader(Stream())) is None
    sampler = WeightedRandomSampler(torch.ones(1000), 1000)
    assert auto(DataLoader(dataset(1000), sampler=sampler)) is None
    assert auto([(torch.zeros(2, 3), torch.zeros(2))]) is None


def test_auto_leaves_the_choice_to_loaders_that_make_it():
    assert auto(DataLoader(dataset(1000)), elsewhere=True) is None


def test_auto_does_not_hide_a_fault_behind_a_sampler():
    class Broken:
        @property
        def indices(self):
            raise RuntimeError("the file of indices is gone")

        def __iter__(self):
            return iter(range(10))

    with pytest.raises(RuntimeError, match="the file of indices is gone"):
        auto(DataLoader(dataset(1000), sampler=Broken()))


@pytest.mark.parametrize("value", [7, None])
def test_other_values_are_the_budget(value):
    request = FitRequest(DataLoader(dataset(1000)), n_samples=value)
    assert supply_for(request, 1, lambda: 3).budget == value


def test_other_strings_are_refused():
    with pytest.raises(ValueError, match="'auto'"):
        FitRequest(DataLoader(dataset(10)), n_samples="all")


@pytest.mark.parametrize("seed", [1.5, None, "a", True])
def test_seed_must_be_an_integer(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        FitRequest(DataLoader(dataset(10)), seed=seed)


def test_a_fit_without_options_takes_the_budget_and_keeps_the_size_of_the_data():
    la = DebiasedLaplace(torch.nn.Linear(3, 2))
    loader = DataLoader(dataset(700), batch_size=50)
    la.fit(loader)
    assert la.n_data == 700
    assert la.fitted.n_samples == RECOMMENDED_SAMPLES
    la.fit(loader, override=False)  # a whole data set more, as in laplace-torch
    assert la.n_data == 1400


def test_samples_of_negligible_weight_are_not_measured_along_their_own_directions(monkeypatch):
    """8 + 8 of 5,000: every sample passes once through the magnitudes, not once per eigenbasis."""
    projected = []
    add = MagnitudeAccumulator.add

    def counted(self, layer, rows, coefficients):
        projected.append(len(coefficients))
        return add(self, layer, rows, coefficients)

    monkeypatch.setattr(MagnitudeAccumulator, "add", counted)
    torch.manual_seed(0)
    data = dataset(5_000)
    for n_data, per_sample in ((5_000, 1), (100, 2)):
        part = TensorDataset(*(tensor[:n_data] for tensor in data.tensors))
        la = DebiasedLaplace(torch.nn.Linear(3, 2, bias=False), sampling="uniform")
        la.fit(DataLoader(part, batch_size=500), n_samples=16)
        assert sum(projected) == 16 * per_sample
        projected.clear()
