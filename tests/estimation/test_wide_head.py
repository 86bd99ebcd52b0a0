"""Last layers of very many classes: directions from sketched rows, curvature in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.rows.gram import RowsFactor
from laplace_debiased.estimation import kron_estimator
from tests.tolerances import assert_exact


def fitted(n_classes: int, n: int = 20, dtype: torch.dtype = torch.float64, **options: Any):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, n_classes)).to(dtype)
        x = torch.randn(n, 4, dtype=dtype)
        y = torch.randint(n_classes, (n,))
    with torch.no_grad():
        model[2].weight *= 3.0
    la = DebiasedLaplace(model, "classification", "last_layer", **options)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=6), n_samples=None)
    return la, x


@pytest.fixture
def from_100_on(monkeypatch) -> None:
    monkeypatch.setattr(kron_estimator, "DENSE_UP_TO", 100)


@pytest.mark.usefixtures("from_100_on")
def test_curvature_along_sketched_directions_is_exact() -> None:
    """One batch for both: uᵀ G u of the dense matrix, and the mean over the complement."""
    la, x = fitted(120, scheme="single", sampling="uniform")
    with torch.no_grad():
        features = la._target.model[:2](x)
        p = torch.softmax(la._target.model(x), -1)
    weight, bias = la.fitted.curvature.basis
    hessians = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    for block, table in zip((weight, bias), la.fitted.curvature.tables, strict=True):
        u = block.output_basis
        assert isinstance(la.fitted.curvature.folds[0].blocks[0].output, RowsFactor)
        assert u.shape[1] < 120
        along = torch.einsum("ci,ncd,di->ni", u, hessians, u)
        traces = hessians.diagonal(dim1=1, dim2=2).sum(-1)
        rest = (traces - along.sum(-1)) / (120 - u.shape[1])
        energies = torch.cat([along, rest.unsqueeze(-1)], -1)
        if block.input_basis is None:
            assert_exact(table, energies.mean(0))
        else:
            inputs = (features @ block.input_basis).square()
            assert_exact(table, energies.T @ inputs / len(x))


@pytest.mark.usefixtures("from_100_on")
def test_predictions_are_near_those_of_a_whole_basis() -> None:
    sketched, x = fitted(120, n=40, prior_precision=3.0, n_outputs=None)
    kron_estimator.DENSE_UP_TO = 1_000  # put back by the fixture
    whole, _ = fitted(120, n=40, prior_precision=3.0, n_outputs=None)
    assert not isinstance(whole.fitted.curvature.folds[0].blocks[0].output, RowsFactor)
    p, q = (la(x, link_approx="mc") for la in (whole, sketched))
    assert float((p * (p / q).log()).sum(-1).mean()) < 2e-3


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else (found,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 4)
        return found


def test_nothing_of_size_c_squared_is_ever_made() -> None:
    """C = 20,000: a [C, C] matrix has 4e8 entries; m, K and ranks are all below 100."""
    with Largest() as seen:
        la, x = fitted(20_000, dtype=torch.float32)
        p = la(x[:4])
        la.optimize_prior_precision(
            val_loader=DataLoader(TensorDataset(x[:4], torch.arange(4)), batch_size=4)
        )
        draws = la.functional_samples(x[:4], n_samples=2)
    assert p.shape == (4, 20_000)
    assert draws.shape == (2, 4, 20_000)
    torch.testing.assert_close(p.sum(-1), torch.ones(4))
    assert seen.numel < 20_000 * 1_000
