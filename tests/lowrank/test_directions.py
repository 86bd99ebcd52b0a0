"""Rows, forward mode and Lanczos agree with one another and with dense matrices."""

from __future__ import annotations

import pytest
import torch

from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.curvature.lowrank import (
    DirectionPass,
    Route,
    RowPass,
    lanczos_eigenpairs,
    projection_costs,
)
from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods import loss_model
from laplace_debiased.network.functional import FunctionalNetwork
from tests.lowrank.problems import (
    ARCHITECTURES,
    Case,
    along,
    case,
    eigenvectors,
    ggn,
    jacobian,
)
from tests.tolerances import relative_error

VECTORISABLE = [kind for kind in ARCHITECTURES if kind != "not vectorisable"]


def row_pass(c: Case, byte_budget: int = 2**29) -> RowPass:
    return RowPass(FunctionalNetwork(c.model, parameter_coverage(c.model).covered), byte_budget)


def some_basis(c: Case, k: int = 4) -> torch.Tensor:
    n_params = sum(p.numel() for p in c.parameters)
    g = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(n_params, k, dtype=torch.float64, generator=g)).Q


def gathered(directions: DirectionPass, c: Case, columns: torch.Tensor) -> torch.Tensor:
    """Σ_r p p over the columns of every sample [m, k]."""
    total = torch.zeros(len(c.x), directions.basis.shape[1], dtype=torch.float64)
    for samples, values in directions.projections(c.x, columns):
        total[samples] += values.square().sum(1)
    return total


@pytest.mark.parametrize("byte_budget", [2**29, 3_000])
@pytest.mark.parametrize("kind", VECTORISABLE)
def test_both_routes_give_the_dense_directional_curvature(kind, byte_budget):
    c = case(kind)
    basis = some_basis(c)
    rows = row_pass(c, byte_budget)
    columns = loss_model("classification").hessian_root(rows.outputs(c.x))
    expected = torch.diagonal(basis.T @ ggn(c) @ basis)
    for route in Route:
        found = gathered(DirectionPass(rows, basis, route), c, columns).mean(0)
        assert relative_error(found, expected) < 1e-10, route


@pytest.mark.parametrize("kind", VECTORISABLE)
def test_forward_mode_gives_jacobian_products(kind):
    c = case(kind)
    basis = some_basis(c)
    expected = jacobian(c.model, c.parameters, c.x)[1] @ basis
    assert (
        relative_error(DirectionPass(row_pass(c), basis).jacobian_products(c.x), expected) < 1e-10
    )


def test_the_cheaper_route_follows_the_number_of_directions_and_columns():
    many_directions = projection_costs(1e6, 10_000, n_columns=9, n_directions=500)
    many_columns = projection_costs(1e6, 10_000, n_columns=999, n_directions=5)
    assert many_directions.cheaper is Route.ROWS
    assert many_columns.cheaper is Route.FORWARD


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_lanczos_finds_the_dense_eigenpairs(kind):
    c = case(kind)
    rows = row_pass(c)
    root = loss_model("classification").hessian_root(rows.outputs(c.x)) / len(c.x) ** 0.5

    def walk():
        for start in range(0, len(c.x), 3):
            part = slice(start, start + 3)
            yield c.x[part], torch.arange(len(c.x))[part]

    pairs = lanczos_eigenpairs(rows.network, walk, lambda at: root[at], 5)
    values, vectors = eigenvectors(ggn(c), 5)
    assert relative_error(pairs.eigenvalues, values) < 1e-9
    assert relative_error(along(pairs.basis, pairs.eigenvalues), along(vectors, values)) < 1e-8


def test_lanczos_refuses_all_directions_and_vanishing_curvature():
    c = case()
    rows = row_pass(c)

    def walk():
        yield c.x, torch.arange(len(c.x))

    zero = torch.zeros(8, 3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="rank"):
        lanczos_eigenpairs(rows.network, walk, lambda at: zero[at], rows.network.n_params)
    with pytest.raises(NumericalError, match="vanishes"):
        lanczos_eigenpairs(rows.network, walk, lambda at: zero[at], 2)
