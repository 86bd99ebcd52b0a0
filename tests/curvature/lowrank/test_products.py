"""Lanczos agrees with dense matrices."""

from __future__ import annotations

import pytest
import torch

from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.curvature.lowrank.products import lanczos_eigenpairs
from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods import loss_model
from laplace_debiased.network.functional import FunctionalNetwork
from tests.lowrank.problems import Case, along, case, eigenvectors, ggn
from tests.tolerances import relative_error


def row_pass(c: Case, byte_budget: int = 2**29) -> RowPass:
    return RowPass(FunctionalNetwork(c.model, parameter_coverage(c.model).covered), byte_budget)


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
