"""A fit on part of the data stands for all of it: N, loss, curvature, marginal likelihood."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler

from laplace_debiased.posterior import DebiasedKronLaplace
from tests.tolerances import SIGMAS, assert_exact, deviation
from tests.zoo import Problem, problem

N, M = 1000, 100
SCHEMES = ["single", "two_batch", "cross_fit"]


@pytest.fixture(scope="module")
def p() -> Problem:
    return problem("mlp", n=N)


def trace(la: DebiasedKronLaplace) -> float:
    return float(sum(block.eigenvalues.sum() for block in la.H.blocks))


def fitted(p: Problem, loader: object, **kwargs: object) -> DebiasedKronLaplace:
    options = {k: kwargs.pop(k) for k in ("scheme", "magnitudes", "sampling") if k in kwargs}
    la = DebiasedKronLaplace(p.model, p.likelihood, **options)
    la.fit(loader, **{"n_samples": None, **kwargs})
    return la


@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_budget_gives_the_full_fits_expected_scale(p: Problem, scheme: str, sampling: str) -> None:
    """Seeds 0..15; the trace and the loss at 3 σ: error rate 0.6 % per case."""
    loader = p.loader(batch_size=100)
    full = fitted(p, loader, scheme="single")
    fits = [
        fitted(p, loader, scheme=scheme, sampling=sampling, n_samples=M, seed=seed)
        for seed in range(16)
    ]
    assert {la.n_data for la in fits} == {N}
    traces = torch.tensor([trace(la) for la in fits], dtype=torch.float64)
    losses = torch.tensor([la.loss for la in fits], dtype=torch.float64)
    assert float(deviation(traces, trace(full))) <= SIGMAS
    assert abs(float(traces.mean()) / trace(full) - 1) < 0.1
    if sampling == "curvature":  # the pool's forward pass gives the loss exactly
        assert losses.tolist() == pytest.approx([full.loss] * 16, rel=1e-9)
    else:
        assert float(deviation(losses, full.loss)) <= SIGMAS


@pytest.mark.parametrize("magnitudes", ["ggn", "kfac"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_of_a_dataset_scale_alike(p: Problem, scheme: str, magnitudes: str) -> None:
    """The same samples as Subset, by a sampler, and by drop_last differ in N alone."""
    index = list(range(M))
    parts = {
        M: DataLoader(Subset(p.dataset, index), batch_size=25),
        N: DataLoader(p.dataset, batch_size=25, sampler=SequentialSubset(index)),
        M + 7: DataLoader(Subset(p.dataset, range(M + 7)), batch_size=25, drop_last=True),
    }
    fits = {
        n: fitted(p, loader, scheme=scheme, magnitudes=magnitudes, n_data=None)
        for n, loader in parts.items()
    }
    base = fits[M]
    for n, la in fits.items():
        assert la.n_data == n
        assert la.loss == pytest.approx(base.loss * n / M)
        if not (scheme == "two_batch" and magnitudes == "ggn"):
            assert trace(la) == pytest.approx(trace(base) * n / M)
        if scheme == "single":  # elsewhere the split into folds depends on the indices' order
            assert_exact(la.H.to_matrix(), base.H.to_matrix() * n / M)
        told = fitted(p, parts[M], scheme=scheme, magnitudes=magnitudes, n_data=n)
        assert float(told.log_marginal_likelihood()) == pytest.approx(
            float(la.log_marginal_likelihood()), rel=1e-9
        )


def test_the_own_share_is_that_of_the_training_set_not_of_the_part(p: Problem) -> None:
    """The mean curvature is (m_D/N)·own + (1 − m_D/N)·other: linear in 1/N, whatever the part."""
    part = p.loader(slice(0, M), batch_size=25)
    means = {n: trace(fitted(p, part, scheme="two_batch", n_data=n)) / n for n in (M, 2 * M, N)}
    slopes = [(means[n] - means[M]) / (1 / n - 1 / M) for n in (2 * M, N)]
    assert abs(slopes[0]) > 1e-3 * means[M]
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-9)
    la = fitted(p, part, scheme="two_batch", n_data=10**9)  # nothing is its own share any more
    assert trace(la) / 10**9 == pytest.approx(means[M] - slopes[1] / M, rel=1e-6)


class SequentialSubset(SubsetRandomSampler):
    """The sampler's indices in their own order."""

    def __iter__(self):
        return iter(self.indices)


def test_shuffled_sampler_equals_the_subset(p: Problem) -> None:
    index = list(range(3, 90, 2))
    sampler = SubsetRandomSampler(index, generator=torch.Generator().manual_seed(4))
    la = fitted(p, DataLoader(p.dataset, batch_size=16, sampler=sampler), scheme="single")
    expected = fitted(p, DataLoader(Subset(p.dataset, index), batch_size=5), scheme="single")
    assert_exact(la.H.to_matrix(), expected.H.to_matrix() * N / len(index))


def test_log_marginal_likelihood_is_the_dense_one(p: Problem) -> None:
    la = fitted(p, p.loader(batch_size=100), scheme="cross_fit", n_samples=M)
    la.prior_precision = 0.3
    precision = la.posterior_precision.to_matrix()
    prior = torch.full((la.n_params,), 0.3, dtype=torch.float64)
    scatter = (prior * la.mean.square()).sum()
    expected = -la.loss - 0.5 * (torch.logdet(precision) - prior.log().sum() + scatter)
    assert_exact(la.log_marginal_likelihood(), expected)


def test_two_loaders_need_n_unless_they_share_a_dataset(p: Problem) -> None:
    b, other = p.loader(slice(0, 30)), p.loader(slice(30, 60))
    la = DebiasedKronLaplace(p.model)
    with pytest.raises(ValueError, match="n_data"):
        la.fit(b, magnitude_loader=other)
    la.fit(b, magnitude_loader=other, n_data=77)
    assert la.n_data == 77
    dataset = p.dataset
    one, two = (
        DataLoader(dataset, batch_size=30, sampler=SequentialSubset(range(k, k + 30)))
        for k in (0, 30)
    )
    la.fit(one, magnitude_loader=two)
    assert la.n_data == N


@pytest.mark.parametrize("scheme", ["two_batch", "cross_fit"])
def test_budget_counts_all_folds(p: Problem, scheme: str) -> None:
    la = fitted(p, p.loader(), scheme=scheme, n_samples=90)
    folds = la.fitted.curvature.folds
    assert [fold.n_samples for fold in folds] == [45, 45]
    la = DebiasedKronLaplace(p.model, scheme="two_batch", direction_fraction=0.2)
    la.fit(p.loader(), n_samples=90)
    assert [fold.n_samples for fold in la.fitted.curvature.folds] == [18, 72]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_budget_of_everything_measures_everything(p: Problem, scheme: str) -> None:
    """At m = N the finite-pool rule leaves the pool's own mean: no draw is left to chance."""
    small = problem("mlp", n=40)
    full = fitted(small, small.loader(), scheme="single")
    la = fitted(small, small.loader(), scheme=scheme, n_samples=40)
    assert trace(la) == pytest.approx(trace(full), rel=1e-10)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_any_number_of_folds_keeps_the_scale(p: Problem, folds: int) -> None:
    small = problem("mlp", n=40)
    full = fitted(small, small.loader(), scheme="single")
    la = DebiasedKronLaplace(small.model, folds=folds)
    la.fit(small.loader(), n_samples=None)
    assert trace(la) == pytest.approx(trace(full), rel=1e-10)
