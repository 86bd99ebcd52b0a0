"""Small posteriors of every class that do not depend on any random generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace

STRUCTURES = {
    "kron": ("all", "kron"),
    "kron_last_layer": ("last_layer", "kron"),
    "lowrank": ("all", "lowrank"),
    "lowrank_last_layer": ("last_layer", "lowrank"),
}
INPUTS = torch.linspace(-2, 2, 30 * 4, dtype=torch.float64).mul(7).sin().reshape(30, 4)
LABELS = torch.arange(30) % 3


def network(scale: float = 1.0) -> nn.Module:
    """Two layers with a normalisation between, in float64; weights are sines."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                steps = torch.arange(tensor.numel(), dtype=torch.float64) + 10 * number
                tensor.copy_((scale * steps.sin()).reshape(tensor.shape))
    model[1].running_var.abs_()
    model[1].requires_grad_(False)
    return model.eval()


def loader(batch_size: int = 7, shuffle: bool = False) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=batch_size, shuffle=shuffle)


def fitted(
    structure: str = "kron", model: nn.Module | None = None, *, n: int | None = None, **options: Any
) -> Any:
    """A posterior of a structure after its fit."""
    subset, hessian = STRUCTURES[structure]
    la = DebiasedLaplace(
        network() if model is None else model, "classification", subset, hessian, **options
    )
    la.fit(loader(), n_samples=n)
    return la


def numbers(la: Any, x: Tensor = INPUTS) -> list[Tensor]:
    """What users read off a posterior."""
    generator = torch.Generator().manual_seed(0)
    return [
        la(x, generator=torch.Generator().manual_seed(2)),
        la(x, pred_type="nn", n_samples=3, generator=generator),
        la.sample(2, torch.Generator().manual_seed(1)),
        la.log_marginal_likelihood().reshape(1),
        la.mean,
        la.prior_precision,
    ]


def assert_equal(one: Any, other: Any) -> None:
    """The same numbers to the bit."""
    for a, b in zip(numbers(one), numbers(other), strict=True):
        assert torch.equal(a, b)


Change = Callable[[nn.Module], None]
