"""The claim itself: own-batch curvature is too large along its directions, other-batch is not.

Two linear layers under a Gaussian likelihood have a known curvature whatever their data: with
inputs of covariance Σ, G₁ = W₂ᵀW₂ ⊗ Σ and G₂ = I ⊗ W₁ΣW₁ᵀ. Every seed draws fresh batches.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.options import Scheme
from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.tolerances import SIGMAS, deviation
from tests.zoo import deep_linear

N_SEEDS, BATCH, TOP = 30, 9, 6
SCALES = torch.tensor([1.2, 1.1, 1.0, 1.0, 0.9, 0.8], dtype=torch.float64)


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return deep_linear().double()


def truth(model: nn.Module) -> Tensor:
    w1, w2 = (layer.weight.detach() for layer in model)
    sigma = torch.diag(SCALES.square())
    return torch.block_diag(
        torch.kron(w2.T @ w2, sigma), torch.kron(torch.eye(2).double(), w1 @ sigma @ w1.T)
    )


def batch(seed: int, m: int = BATCH) -> DataLoader:
    g = torch.Generator().manual_seed(seed)
    x = SCALES * torch.randn(m, 6, generator=g, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.zeros(m, 2, dtype=torch.float64)), batch_size=m)


def top_ratios(magnitudes: str, *, same: bool, scheme: str | None = None) -> Tensor:
    """Measured over true curvature along the top directions of B, one row per seed."""
    model = network()
    known = truth(model)
    rows = []
    for seed in range(N_SEEDS):
        la = DebiasedKronLaplace(model, "regression", magnitudes=magnitudes, scheme=scheme)
        directions = batch(2 * seed)
        other = directions if same else batch(2 * seed + 1)
        if scheme == Scheme.SINGLE.value:
            la.fit(directions, n_data=1)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                la.fit(directions, magnitude_loader=other, n_data=1)
        measured, true = oracles.table(la.H), oracles.directional(la.H, known)
        own = torch.cat([t.flatten() for t in _own(la)])
        top = own.argsort(descending=True)[:TOP]
        rows.append((measured[top] / true[top]).mean())
    return torch.stack(rows)


def _own(la: DebiasedKronLaplace) -> list[Tensor]:
    basis = la.fitted.curvature.basis
    return [torch.outer(b.output_eigenvalues, b.input_eigenvalues) for b in basis]


@pytest.mark.parametrize("magnitudes", ["ggn", "kfac"])
def test_other_batch_is_unbiased_along_the_top_directions(magnitudes: str) -> None:
    """Seeds 0..59, 30 pairs of batches; one comparison at 3 σ: error rate 0.3 %."""
    ratios = top_ratios(magnitudes, same=False)
    assert float(deviation(ratios, 1.0)) <= SIGMAS


@pytest.mark.parametrize(
    ("magnitudes", "scheme"), [("ggn", None), ("kfac", None), ("ggn", "single")]
)
def test_same_batch_fails_the_same_test(magnitudes: str, scheme: str | None) -> None:
    """The mutant B̃ = B: far more than 3 σ too large, by a third at least."""
    ratios = top_ratios(magnitudes, same=True, scheme=scheme)
    assert float(deviation(ratios, 1.0)) > 2 * SIGMAS
    assert float(ratios.mean()) > 1.33
