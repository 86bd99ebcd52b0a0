"""Exact magnitudes are the directional curvatures of the dense GGN, for any B and B̃."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.tolerances import assert_exact, assert_same
from tests.zoo import KINDS, Problem, problem

B, OTHER = slice(0, 12), slice(12, 26)
# Twelve samples give every factor full rank: bases are unique, and two fits can be compared.


def two_batches(p: Problem, batch_size: int = 5, **options: object) -> DebiasedKronLaplace:
    """Directions from B, magnitudes from the other samples, N = 1."""
    la = DebiasedKronLaplace(p.model, p.likelihood, **options)
    la.fit(p.loader(B, batch_size), magnitude_loader=p.loader(OTHER, batch_size), n_data=1)
    return la


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("kind", KINDS)
def test_table_is_the_diagonal_of_the_other_batchs_ggn(kind: str, likelihood: str) -> None:
    p = problem(kind, likelihood)
    la = two_batches(p)
    expected = oracles.directional(la.H, oracles.ggn(p, p.names, OTHER))
    assert_exact(oracles.table(la.H), expected)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_table_is_the_diagonal_of_the_other_batchs_empirical_fisher(likelihood: str) -> None:
    p = problem("cnn", likelihood)
    la = two_batches(p, fisher="empirical")
    expected = oracles.directional(la.H, oracles.ggn(p, p.names, OTHER, "empirical"))
    assert_exact(oracles.table(la.H), expected)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "positions"])
def test_same_batch_twice_gives_the_single_batch_table(kind: str) -> None:
    p = problem(kind)
    single = DebiasedKronLaplace(p.model, scheme="single")
    single.fit(p.loader(B), n_data=1)
    twice = DebiasedKronLaplace(p.model)
    with pytest.warns(UserWarning, match="share 12 samples"):
        twice.fit(loader := p.loader(B), magnitude_loader=loader, n_data=1)
    assert_exact(oracles.table(twice.H), oracles.table(single.H))


@given(st.integers(1, 12), st.integers(1, 11), st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_any_two_batches_give_the_diagonal_of_the_dense_ggn(m: int, other: int, seed: int) -> None:
    p = problem("mlp", n=m + other, seed=seed)
    la = DebiasedKronLaplace(p.model)
    la.fit(p.loader(slice(0, m)), magnitude_loader=p.loader(slice(m, None)), n_data=1)
    expected = oracles.directional(la.H, oracles.ggn(p, p.names, slice(m, None)))
    assert_exact(oracles.table(la.H), expected)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "head_positions"])
def test_bias_basis_diagonalises_the_batchs_dense_bias_block(kind: str) -> None:
    p = problem(kind)
    la = two_batches(p)
    for name, basis in zip(la.coverage.covered, oracles.dense_bases(la.H), strict=True):
        if not name.endswith("bias"):
            continue
        rotated = basis.T @ oracles.ggn(p, [name], B) @ basis
        assert_exact(torch.diag(rotated.diagonal()), rotated)
        assert bool((rotated.diagonal().diff() >= -1e-12).all()), "eigenvalues ascend"


def test_table_is_the_frobenius_optimal_diagonal_in_its_basis() -> None:
    p = problem("cnn")
    la = two_batches(p)
    basis, table = oracles.dense_basis(la.H), oracles.table(la.H)
    target = oracles.ggn(p, p.names, OTHER)

    def error(values: torch.Tensor) -> float:
        return float((target - (basis * values) @ basis.T).norm())

    generator = torch.Generator().manual_seed(0)
    best = error(table)
    for _ in range(20):
        step = torch.randn(len(table), generator=generator, dtype=torch.float64)
        assert error(table + 1e-3 * table.norm() * step / step.norm()) > best


@pytest.mark.parametrize("fisher", ["type2", "mc", "empirical"])
@pytest.mark.parametrize("magnitudes", ["ggn", "kfac"])
@pytest.mark.parametrize("kind", ["cnn", "positions"])
def test_chunks_and_workspace_change_nothing(kind: str, magnitudes: str, fisher: str) -> None:
    p = problem(kind)
    options = {"magnitudes": magnitudes, "fisher": fisher, "mc_samples": 2}
    whole = two_batches(p, **options)
    tiny = two_batches(p, byte_budget=1, **options)
    assert_same(tiny.H.to_matrix(), whole.H.to_matrix())


@pytest.mark.parametrize("magnitudes", ["ggn", "kfac"])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_rebatching_changes_nothing(batch_size: int, magnitudes: str) -> None:
    p = problem("cnn")
    expected = two_batches(p, magnitudes=magnitudes)
    actual = two_batches(p, batch_size, magnitudes=magnitudes)
    assert_same(actual.H.to_matrix(), expected.H.to_matrix())
    assert math.isclose(actual.loss, expected.loss, rel_tol=1e-12)


@pytest.mark.parametrize("magnitudes", ["ggn", "kfac"])
def test_reordering_within_the_batches_changes_nothing(magnitudes: str) -> None:
    p = problem("cnn")
    order = torch.cat([torch.randperm(12), 12 + torch.randperm(14)])
    shuffled = Problem(p.model, p.x[order], p.y[order], p.likelihood)
    expected = two_batches(p, magnitudes=magnitudes)
    assert_same(two_batches(shuffled, magnitudes=magnitudes).H.to_matrix(), expected.H.to_matrix())


@pytest.mark.parametrize("magnitudes", ["ggn", "kfac"])
def test_repeating_every_sample_leaves_means_alone(magnitudes: str) -> None:
    p = problem("mlp", n=12)
    doubled = Problem(p.model, p.x.repeat(2, 1), p.y.repeat(2), p.likelihood)
    one, two = (
        DebiasedKronLaplace(q.model, scheme="single", magnitudes=magnitudes) for q in (p, doubled)
    )
    one.fit(p.loader(), n_data=24)
    two.fit(doubled.loader(), n_data=24)
    assert_same(two.H.to_matrix(), one.H.to_matrix())


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_layers_with_only_their_weight_or_bias_trainable(kind: str, part: str) -> None:
    p = problem(kind)
    for name, parameter in p.model.named_parameters():
        parameter.requires_grad_(name.endswith(part))
    la = two_batches(p)
    assert list(la.coverage.covered) == p.names
    expected = oracles.directional(la.H, oracles.ggn(p, p.names, OTHER))
    assert_exact(oracles.table(la.H), expected)


def test_scaling_the_inputs_of_a_linear_model_scales_its_weight_curvature() -> None:
    p = problem("mlp", "regression")
    model = nn.Linear(4, 3).double()
    base = Problem(model, p.x, p.y, "regression")
    scaled = Problem(model, 3 * p.x, p.y, "regression")
    one, two = two_batches(base), two_batches(scaled)
    assert_same(two.H.blocks[0].eigenvalues, 9 * one.H.blocks[0].eigenvalues)
    assert_same(two.H.blocks[1].eigenvalues, one.H.blocks[1].eigenvalues)
