"""On a GPU: the same posterior and the same predictions as on the CPU, to single precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def problem() -> tuple[nn.Module, DataLoader, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * 12 * 12, 3),
        )
        x, y = torch.randn(40, 1, 12, 12), torch.randint(0, 3, (40,))
    return model, DataLoader(TensorDataset(x, y), batch_size=16), x[:8]


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("budget", [None, 16])
def test_a_gpu_gives_what_the_cpu_gives(structure, subset, budget, tmp_path):
    model, loader, x = problem()
    expected = DebiasedLaplace(model, "classification", subset, structure)
    expected.fit(loader, n_samples=budget)
    on_gpu = copy.deepcopy(model).cuda()
    la = DebiasedLaplace(on_gpu, "classification", subset, structure)
    la.fit(loader, n_samples=budget)
    torch.testing.assert_close(la(x.cuda()).cpu(), expected(x), rtol=1e-3, atol=1e-4)
    la.save(tmp_path / "posterior.pt")
    moved = DebiasedLaplace.load(tmp_path / "posterior.pt", model)
    torch.testing.assert_close(moved(x), expected(x), rtol=1e-3, atol=1e-4)
