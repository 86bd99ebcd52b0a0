"""Factors of few rows are kept by their coordinates along the posterior's directions."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.rows.gram import RowsFactor, dense
from laplace_debiased.estimation.kron_state import SpannedRows
from laplace_debiased.files import nested
from tests.untouched import equal


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


def posterior(dtype=torch.float64, n_samples=8, seed=0, **options):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 60, generator=generator, dtype=dtype)
    loader = DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=16)
    la = DebiasedLaplace(network(dtype), **options)
    la.fit(loader, n_samples=n_samples, seed=seed)
    return la, loader


def factors(la):
    """(fold's factor, posterior's basis) of the two sides of the first weight."""
    curvature = la.fitted.curvature
    basis = curvature.basis[0]
    return [
        pair
        for fold in curvature.folds
        for pair in (
            (fold.blocks[0].output, basis.output_basis),
            (fold.blocks[0].input, basis.input_basis),
        )
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folds_that_gave_the_directions_are_kept_by_their_coordinates(dtype):
    la, _ = posterior(dtype)
    for factor, basis in factors(la):
        assert isinstance(factor, SpannedRows)
        assert factor.coordinates.shape[-1] == basis.shape[-1] < basis.shape[-2]
    fit = la.fitted
    basis, (first, second) = fit.curvature.basis[0], fit.curvature.folds
    shares = [fold.n_samples / (first.n_samples + second.n_samples) for fold in (first, second)]
    for side in ("output", "input"):
        whole = sum(
            share * dense(getattr(fold.blocks[0], side))
            for share, fold in zip(shares, (first, second), strict=True)
        )
        u, values = getattr(basis, f"{side}_basis"), getattr(basis, f"{side}_eigenvalues")
        expected = (u * values[:-1]) @ u.mT
        tolerance = 1e-10 if dtype is torch.float64 else 1e-5
        assert float((whole - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_rows_outside_of_the_directions_are_kept_whole():
    la, _ = posterior(scheme="two_batch")
    own, other = factors(la)[:2], factors(la)[2:]
    assert all(isinstance(factor, SpannedRows) for factor, _ in own)
    assert all(type(factor) is RowsFactor for factor, _ in other)
    la, _ = posterior(max_rank=2)
    assert all(type(factor) is RowsFactor for factor, _ in factors(la))


def test_a_state_holds_the_coordinates_and_comes_back_to_the_bit():
    la, loader = posterior()
    state = nested(la.state_dict())
    assert set(state["folds"][0]["blocks"][0]["input"]) == {"coordinates"}
    again = DebiasedLaplace(network())
    again.load_state_dict(copy.deepcopy(state))
    assert equal(nested(again.state_dict())["folds"], state["folds"])
    for one in (la, again):
        one.fit(loader, n_samples=8, seed=5, override=False)
    assert equal(nested(again.state_dict())["tables"], nested(la.state_dict())["tables"])


def test_states_of_version_3_hold_the_rows_and_load():
    la, loader = posterior()
    state = nested(copy.deepcopy(la.state_dict()))
    state["version"] = 3
    for fold, kept in zip(state["folds"], la.fitted.curvature.folds, strict=True):
        for block, factor in zip(fold["blocks"], kept.blocks, strict=True):
            for side in ("output", "input"):
                value = getattr(factor, side)
                if isinstance(value, RowsFactor):
                    block[side] = {"rows": value.rows.clone()}
                elif value is not None:
                    block[side] = value.clone()
    again = DebiasedLaplace(network())
    again.load_state_dict(state)
    inputs = next(iter(loader))[0]
    assert torch.equal(again(inputs), la(inputs))
    assert again.fitted.n_samples == 8


def test_a_file_of_few_samples_is_at_most_three_times_the_weights(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(900, 700), nn.ReLU(), nn.Linear(700, 10))
    inputs = torch.randn(40, 900)
    la = DebiasedLaplace(model)
    la.fit(DataLoader(TensorDataset(inputs, torch.arange(40) % 10)), n_samples=8)
    la.save(tmp_path / "la.pt")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "la.pt").stat().st_size < 1.25 * weights
