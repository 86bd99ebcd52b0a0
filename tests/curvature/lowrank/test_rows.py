"""Rows of any network against ordinary backward passes, in tiles of any size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.network.functional import FunctionalNetwork
from tests.lowrank.problems import ARCHITECTURES, Case, Tokens, case, jacobian
from tests.tolerances import relative_error


def row_pass(c: Case, byte_budget: int = 2**29) -> RowPass:
    names = parameter_coverage(c.model).covered
    return RowPass(FunctionalNetwork(c.model, names), byte_budget)


def identity(c: Case) -> torch.Tensor:
    return torch.eye(3, dtype=c.x.dtype).expand(len(c.x), -1, -1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_are_the_jacobians_of_ordinary_backward_passes(kind):
    c = case(kind)
    outputs, expected = jacobian(c.model, c.parameters, c.x)
    rows = row_pass(c)
    assert relative_error(rows.outputs(c.x), outputs) < 1e-12
    assert relative_error(rows.rows(c.x, identity(c)), expected) < 1e-12


@pytest.mark.parametrize("byte_budget", [1, 4_000, 20_000])
@pytest.mark.parametrize("kind", ["mlp", "not vectorisable"])
def test_tiles_cover_every_row_once_whatever_the_budget(kind, byte_budget):
    c = case(kind)
    columns = torch.randn(8, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = row_pass(c).rows(c.x, columns)
    found = torch.zeros_like(expected)
    small = row_pass(c, byte_budget)
    for tile, rows in small.walk(c.x, columns):
        found[tile.samples, tile.columns] += rows
    assert len(small.tiles(c.x, 5)) > 1
    assert relative_error(found, expected) < 1e-13


def test_a_budget_below_one_sample_splits_its_columns():
    tiles = row_pass(case(), 1).tiles(case().x, 5)
    assert len(tiles) == 8 * 5
    assert {tile.columns.stop - tile.columns.start for tile in tiles} == {1}


def test_mapping_inputs_keep_what_is_not_per_sample():
    torch.manual_seed(0)
    model = Tokens().double()
    ids = torch.randint(7, (6, 5))
    batch = {"input_ids": ids, "name": "left alone", "table": torch.ones(2)}
    names = parameter_coverage(model).covered
    rows = RowPass(FunctionalNetwork(model, names)).rows(
        batch, torch.eye(3, dtype=torch.float64).expand(6, -1, -1)
    )
    expected = jacobian(model, list(model.parameters()), {"input_ids": ids})[1]
    assert relative_error(rows, expected) < 1e-12


def test_half_precision_networks_have_float32_rows():
    wide = case(dtype=torch.float32)
    expected = row_pass(wide).rows(wide.x, identity(wide))
    model = wide.model.to(torch.bfloat16)
    half = Case(model, wide.x.bfloat16(), wide.y, "classification")
    rows = row_pass(half).rows(half.x, identity(half).float())
    assert rows.dtype is torch.float32
    assert relative_error(rows, expected) < 2e-2  # the weights were rounded to 8 bits


def test_frozen_parameters_are_excluded_with_a_reason():
    c = case()
    c.model[0].weight.requires_grad_(False)
    coverage = parameter_coverage(c.model)
    assert coverage.covered == ("0.bias", "2.weight", "2.bias")
    assert "frozen" in coverage.excluded["0.weight"]
    assert row_pass(c).rows(c.x, identity(c)).shape == (8, 3, coverage.n_covered)


def test_a_network_that_mixes_samples_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    c = Case(model.double().train(), case().x, case().y, "classification")
    with pytest.raises((ValueError, RuntimeError)):
        row_pass(c).check_samples_are_independent(c.x)
    row_pass(case()).check_samples_are_independent(case().x)


def test_rows_are_differentiable_in_the_inputs():
    c = case()
    x = c.x[:2].clone().requires_grad_()
    rows = row_pass(c)

    def total(inputs: torch.Tensor) -> torch.Tensor:
        return rows.rows(inputs, identity(c)[:2], differentiable=True).square().sum()

    assert torch.autograd.gradcheck(total, (x,))
