"""A state holds one triangle of every factor that is a symmetric matrix, and nothing is lost."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.rows.gram import RowsFactor
from laplace_debiased.files import nested
from laplace_debiased.parallel.sums import from_triangle, triangle_of
from tests.untouched import equal


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers).double()


def posterior():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(60, 4, 4, 4, generator=generator, dtype=torch.float64)
    loader = DataLoader(TensorDataset(inputs, torch.arange(60) % 3), batch_size=16)
    la = DebiasedLaplace(network())
    la.fit(loader, n_samples=50)
    return la, loader


def matrices(la):
    """Every factor of the folds that is a matrix, with its entry's place."""
    return {
        (k, n, side): factor
        for k, fold in enumerate(la.fitted.curvature.folds)
        for n, block in enumerate(fold.blocks)
        for side in ("output", "input")
        if isinstance(factor := getattr(block, side), torch.Tensor) and factor.ndim > 1
    }


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 4, 4)])
def test_triangles_come_back_as_their_matrices(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.mT
    side = shape[-1]
    triangle = triangle_of(matrix)
    assert triangle.shape == (*shape[:-2], side * (side + 1) // 2)
    assert torch.equal(from_triangle(triangle, side), matrix)


def test_factors_are_symmetric_to_the_bit_and_kept_by_their_triangles():
    la, _ = posterior()
    state = nested(la.state_dict())
    found = matrices(la)
    assert {factor.ndim for factor in found.values()} == {2, 3}, "groups are among them"
    for (k, n, side), factor in found.items():
        assert torch.equal(factor, factor.mT)
        entry = state["folds"][k]["blocks"][n][side]
        assert set(entry) == {"triangle"}
        assert torch.equal(entry["triangle"], triangle_of(factor))


def test_a_state_comes_back_to_the_bit():
    la, loader = posterior()
    again = DebiasedLaplace(network())
    again.load_state_dict(copy.deepcopy(la.state_dict()))
    assert equal(nested(again.state_dict())["folds"], nested(la.state_dict())["folds"])
    for key, factor in matrices(la).items():
        assert torch.equal(matrices(again)[key], factor)
    for one in (la, again):
        one.fit(loader, n_samples=50, seed=5, override=False)
    assert equal(nested(again.state_dict())["tables"], nested(la.state_dict())["tables"])


def test_states_of_version_4_hold_whole_matrices_and_load():
    la, loader = posterior()
    state = nested(copy.deepcopy(la.state_dict()))
    state["version"] = 4
    for (k, n, side), factor in matrices(la).items():
        # Those were symmetric up to rounding.
        state["folds"][k]["blocks"][n][side] = factor + (1e-15 * factor).tril(-1)
    again = DebiasedLaplace(network())
    again.load_state_dict(state)
    inputs = next(iter(loader))[0]
    assert torch.equal(again(inputs), la(inputs))
    assert equal(nested(again.state_dict())["folds"], nested(la.state_dict())["folds"])


def test_a_triangle_that_was_cut_is_named_as_damage():
    la, _ = posterior()
    state = nested(copy.deepcopy(la.state_dict()))
    entry = state["folds"][0]["blocks"][0]["output"]
    assert not isinstance(la.fitted.curvature.folds[0].blocks[0].output, RowsFactor)
    entry["triangle"] = entry["triangle"][..., :-1]
    with pytest.raises(ValueError, match="damaged or was edited"):
        DebiasedLaplace(network()).load_state_dict(state)
