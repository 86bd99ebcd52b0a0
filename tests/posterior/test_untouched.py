"""Fits, predictions and tuning leave the user's world as it was, also when something breaks."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from laplace.curvature.asdl import AsdlGGN
from laplace.curvature.backpack import BackPackGGN
from laplace.curvature.curvlinops import CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior import DebiasedKronLaplace
from tests.zoo import Breaking, problem


class Trap(nn.Module):
    """Layers of every kind, in mixed modes, with hooks, gradients and a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu_(self.norm(self.convolution(x)))
        return self.head(self.dropout(hidden).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    trap = Trap().double()
    trap.train()
    trap.norm.eval()
    trap.convolution.bias.requires_grad_(False)
    trap.head.weight.grad = torch.ones_like(trap.head.weight)
    trap.head.register_forward_hook(lambda module, args, output: None)
    trap.note = "mine"
    return trap


@pytest.fixture
def loader() -> DataLoader:
    p = problem("cnn", n=24)
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(p.x, p.y), batch_size=7, shuffle=True, generator=generator)


OPTIONS = [
    {},
    {"scheme": "single", "magnitudes": "kfac"},
    {"scheme": "two_batch", "fisher": "mc"},
    {"sampling": "curvature"},
    {"magnitudes": "kfac", "backend": CurvlinopsGGN, "scheme": "two_batch"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_changes_in_a_users_life(model, loader, untouched, options: dict) -> None:
    x, generator = next(iter(loader))[0], torch.Generator().manual_seed(0)
    validation = DataLoader(loader.dataset, batch_size=10)
    if "backend" in options:
        model.convolution.bias.requires_grad_(True)
    with untouched(model, loader):
        la = DebiasedKronLaplace(model, **options)
        la.fit(loader, n_samples=16)
        la.fit(loader, n_samples=4, override=False, seed=1)
        for link in ("probit", "mc", "bridge", "bridge_norm"):
            la(x, link_approx=link, generator=generator)
        la(x, pred_type="nn", n_samples=2, generator=generator)
        la.predictive_samples(x, n_samples=2, generator=generator)
        la.sample(2, generator)
        la.optimize_prior_precision(n_steps=2)
        for kwargs in ({}, {"pred_type": "nn", "n_samples": 2}, {"link_approx": "mc"}):
            la.optimize_prior_precision(
                val_loader=validation, grid_size=3, log_prior_prec_min=-9, **kwargs
            )
        la.log_marginal_likelihood()
        la.load_state_dict(la.state_dict())
        str(la.coverage)


@pytest.mark.parametrize("backend", [CurvlinopsGGN, BackPackGGN, AsdlGGN])
def test_backends_leave_no_hooks_behind(backend, untouched) -> None:
    p = problem("mlp")
    with untouched(p.model):
        la = DebiasedKronLaplace(p.model, magnitudes="kfac", backend=backend)
        la.fit(p.loader(), n_samples=20)
        la(p.x)


def test_modes_and_dropout_do_not_reach_the_predictions(model, loader) -> None:
    la = DebiasedKronLaplace(model)
    la.fit(loader)
    x = loader.dataset.tensors[0]
    in_training = la(x)
    model.eval()
    assert torch.equal(la(x), in_training)


@pytest.mark.parametrize("from_walk", [0, 1, 2])
@pytest.mark.parametrize("magnitudes", ["kfac", "ggn"])
def test_loader_that_raises_half_way_loses_nothing(
    model, loader, untouched, magnitudes: str, from_walk: int
) -> None:
    la = DebiasedKronLaplace(model, magnitudes=magnitudes)
    la.fit(loader)
    x = next(iter(loader))[0]
    before, state = la(x), la.state_dict()
    evidence = la.log_marginal_likelihood()
    plain = DataLoader(loader.dataset, batch_size=7)
    breaking = Breaking(plain, 2, from_walk)
    for override in (True, False):
        breaking.walks = 0
        with untouched(model, loader), contextlib.suppress(OSError):
            la.fit(breaking, override=override, n_data=24)
            assert from_walk == 2, "a walk that breaks went unnoticed"
            la.load_state_dict(state)
        assert torch.equal(la(x), before)
        assert la.log_marginal_likelihood() == evidence


def test_validation_loader_that_raises_leaves_the_prior(model, loader, untouched) -> None:
    la = DebiasedKronLaplace(model, prior_precision=3.0)
    la.fit(loader)
    for pred_type in ("glm", "nn"):
        with untouched(model, loader), pytest.raises(OSError, match="disk"):
            la.optimize_prior_precision(pred_type, val_loader=Breaking(loader, 1), n_samples=2)
        assert la.prior_precision.item() == 3.0


def test_model_that_raises_leaves_no_hooks(model, loader, untouched) -> None:
    la = DebiasedKronLaplace(model)
    la.fit(loader)
    with untouched(model), pytest.raises(RuntimeError):
        la(torch.zeros(2, 5, 6, 6).double())
    wrong = DataLoader(TensorDataset(torch.zeros(8, 5, 6, 6).double(), torch.zeros(8).long()))
    with untouched(model), pytest.raises(RuntimeError):
        la.fit(wrong)


def test_guard_notices_each_kind_of_change(model, untouched) -> None:
    """The guard itself can fail."""

    def write_weight() -> None:
        with torch.no_grad():
            model.head.weight.add_(1.0)

    changes = [
        write_weight,
        model.eval,
        lambda: setattr(model.head.weight, "grad", None),
        lambda: model.norm.register_forward_hook(lambda *a: None),
        lambda: model.head.bias.requires_grad_(False),
        lambda: setattr(model, "output_size", 3),
        lambda: torch.rand(1),
    ]
    for change in changes:
        with pytest.raises(AssertionError, match="changed"), untouched(model):
            change()


def test_spectral_norm_in_training_mode_keeps_its_buffers() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)).train()
    before = copy.deepcopy(model.state_dict())
    la = DebiasedKronLaplace(model, "classification")
    x = torch.randn(12, 4)
    for _ in range(2):  # constructed, and then fitted and used
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training
        assert layer.training
        la.fit(DataLoader(TensorDataset(x, torch.arange(12) % 3)))
        la(x)
