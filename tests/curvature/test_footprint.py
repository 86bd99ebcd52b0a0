"""What a pass thinks that a sample takes is what it takes, within a factor of two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.predictive import OutputCovariance, OutputSelection
from tests.predictive.test_budget import added_bytes

MANY = 2**40
K = 20


class Tokens(nn.Module):
    """An embedding, and maps of twelve positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.norm = (
            nn.Embedding(200, 48),
            nn.Linear(48, 48),
            nn.LayerNorm(48),
        )
        self.head = nn.Linear(48, K)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.inner(self.embed(x)))).mean(1))


def linear() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 128), nn.Tanh(), nn.Linear(128, K)]
    return nn.Sequential(*layers), torch.randn(32, 256)


def convolutions() -> tuple[nn.Module, Tensor]:
    layers = [
        nn.Conv2d(3, 64, 3, stride=4),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 96, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(96, 96, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, K),
    ]
    return nn.Sequential(*layers), torch.randn(32, 3, 32, 32)


def tokens() -> tuple[nn.Module, Tensor]:
    return Tokens(), torch.randint(200, (32, 12))


def few_positions() -> tuple[nn.Module, Tensor]:
    """Wide maps of four positions, whose thin bases spare what whole ones form."""
    layers = [nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Flatten(), nn.Linear(1024, K)]
    return nn.Sequential(*layers), torch.randn(32, 4, 64)


@pytest.mark.parametrize("n_samples", [4, 32])
@pytest.mark.parametrize("make", [linear, convolutions, tokens, few_positions])
def test_the_estimate_is_within_a_factor_of_two(
    make: Callable[[], tuple[nn.Module, Tensor]], n_samples: int
) -> None:
    """What eight more samples add, so that nothing counts that does not grow with them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = make()
    loader = DataLoader(TensorDataset(x, torch.arange(32) % K), batch_size=32)
    la = DebiasedLaplace(model.eval(), prior_precision=10.0, byte_budget=MANY)
    la.fit(loader, n_samples=n_samples)
    engine = la.predictor.engine
    precision = la.predictor.precision(la._H_factor, la.prior_precision)
    bases = dict(zip(la.predictor.names, precision.blocks, strict=True))
    ones = torch.ones(len(x))

    def predict(m: int) -> None:
        kind, selection = OutputCovariance.PER_SAMPLE, OutputSelection(K)
        la.predictor.moments(x[:m], precision, kind, selection)

    def measure(m: int) -> None:
        def columns(outputs: Tensor, rows: slice) -> Tensor:
            return torch.eye(K).expand(len(outputs), K, K)

        for chunk in engine.chunks(x[:m], columns, bases=bases):
            for name, rows in chunk.blocks:
                rows.curvature(bases[name], ones[:m])

    estimate = 8 * engine._footprint(x).bytes(K, bases)
    for walk in (predict, measure):
        found = added_bytes(lambda walk=walk: walk(24)) - added_bytes(lambda walk=walk: walk(16))
        assert 0.5 < estimate / found < 2.0, (walk.__name__, estimate / found)


def test_thin_bases_take_less_than_whole_ones() -> None:
    """Which would let a quarter of the samples into a chunk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = few_positions()
    la = DebiasedLaplace(model, prior_precision=10.0)
    la.fit(DataLoader(TensorDataset(x, torch.arange(32) % K), batch_size=32), n_samples=2)
    bases = dict(zip(la.predictor.names, la.H.blocks, strict=True))
    footprint = la.predictor.engine._footprint(x)
    assert footprint.bytes(K) > 4 * footprint.bytes(K, bases)
    assert footprint.columns_in(2**22, bases) > 4 * footprint.columns_in(2**22)
