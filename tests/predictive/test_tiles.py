"""The columns of one sample, tile by tile: the same moments in the memory that there is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.tape import Tape
from laplace_debiased.predictive import KronPredictor, OutputCovariance, OutputSelection
from tests.predictive.test_budget import MIB, added_bytes
from tests.tolerances import assert_exact

N_CLASSES, K = 6, 4


class Everything(nn.Module):
    """Rows of every form: tables, maps of one, few and many positions, groups, norms, tied maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.inner = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.code = nn.Embedding(9, 8)
        self.conv, self.groups = nn.Conv1d(8, 6, 2), nn.Conv1d(6, 6, 1, groups=2)
        self.head = nn.Linear(6, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.inner(self.embed(x))) @ self.embed.weight.T
        h = torch.tanh(h[..., :8] + self.code(x))
        return self.head(torch.tanh(self.groups(torch.tanh(self.conv(h.mT)))).mean(2))


@cache
def fitted(max_rank: int | None, byte_budget: int = 2**30) -> tuple[DebiasedLaplace, Tensor]:
    """Whole bases, or thin ones on both sides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Everything().double(), torch.randint(9, (10, 4))
    la = DebiasedLaplace(model, prior_precision=3.0, byte_budget=byte_budget, max_rank=max_rank)
    loader = DataLoader(TensorDataset(x, torch.arange(10) % N_CLASSES), batch_size=10)
    la.fit(loader, n_samples=None)
    return la, x


def with_budget(predictor: KronPredictor, byte_budget: int) -> KronPredictor:
    return replace(predictor, engine=replace(predictor.engine, byte_budget=byte_budget))


def moments(
    predictor: KronPredictor, x: Tensor, n_outputs: int | None, *, diagonal: bool
) -> list[Tensor]:
    """Predicted and swept."""
    kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
    h, priors = torch.ones((), dtype=torch.float64), torch.tensor([0.5, 40.0]).double()
    selection = OutputSelection(n_outputs)
    found = predictor.moments(x, predictor.precision(h, priors[:1]), kind, selection)
    swept = predictor.sweep(x, h, priors, selection, diagonal=diagonal)
    assert_exact(swept.covariances[0], found.covariance)
    return [found.mean, found.covariance, swept.covariances, swept.prior_only]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("n_outputs", [K, None])
@pytest.mark.parametrize("max_rank", [None, 3])
def test_tiles_change_nothing(
    max_rank: int | None, n_outputs: int | None, diagonal: bool, monkeypatch
) -> None:
    """From a column at a time, every pair of columns on its own, to all of them."""
    la, x = fitted(max_rank)
    assert sum(block.is_thin for block in la.H.blocks) >= 8 or max_rank is None
    whole = moments(la.predictor, x[:2], n_outputs, diagonal=diagonal)
    n_columns, most = n_outputs or N_CLASSES, la.predictor.engine._footprint(x).bytes(n_outputs)
    pulled: list[int] = []
    pull_back = Tape.pull_back
    monkeypatch.setattr(
        Tape, "pull_back", lambda *a, **k: (pulled.append(1), pull_back(*a, **k))[1]
    )
    counts = []
    for budget in (1, most // 2, 30 * most):
        pulled.clear()
        found = moments(with_budget(la.predictor, budget), x[:2], n_outputs, diagonal=diagonal)
        counts.append(sum(pulled))
        for one, other in zip(found, whole, strict=True):
            assert_exact(one, other)
    once = 2 * 2 * n_columns
    pairs = once if diagonal else 2 * n_columns * (n_columns + 1)
    assert counts[0] == pairs
    assert once <= counts[1] <= pairs
    assert counts[2] == 2 * n_columns


@pytest.mark.parametrize("max_rank", [None, 3])
def test_fits_with_tiles_are_the_same(max_rank: int | None) -> None:
    one, other = fitted(max_rank)[0], fitted(max_rank, 1)[0]
    for left, right in zip(one.H.blocks, other.H.blocks, strict=True):
        assert_exact(right.eigenvalues, left.eigenvalues)


@pytest.mark.parametrize("n_outputs", [32, None])
def test_one_sample_stays_in_the_budget(n_outputs: int | None) -> None:
    """2 MiB, of which all columns together take more than four times as much."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 65)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = nn.Sequential(*layers, *last), torch.randn(6, 3, 40, 40), torch.arange(6)
    loader, budget = DataLoader(TensorDataset(x, y), batch_size=6), 2 * MIB
    la = DebiasedLaplace(model, prior_precision=100.0, n_outputs=n_outputs, byte_budget=budget)
    peaks = {"fit": added_bytes(partial(la.fit, loader, n_samples=2))}
    priors, h, selection = torch.logspace(0, 4, 2), la._H_factor, OutputSelection(n_outputs)
    for size, limits in ((budget, (0, 1.5 * budget)), (256 * MIB, (4 * budget, 256 * MIB))):
        predictor = with_budget(la.predictor, size)
        precision = predictor.precision(h, la.prior_precision)
        kind = OutputCovariance.PER_SAMPLE
        call = partial(predictor.moments, x[:1], precision, kind, selection)
        peaks["prediction"] = added_bytes(call)
        call = partial(predictor.sweep, x[:1], h, priors, selection, diagonal=False)
        peaks["sweep"] = added_bytes(call)
        low, high = limits
        assert low < min(peaks["prediction"], peaks["sweep"]), peaks
        assert max(peaks["prediction"], peaks["sweep"]) < high, peaks
    assert peaks["fit"] < 1.5 * budget, peaks
