"""A block of groups is the direct sum of its groups' blocks."""

import pytest
import torch

from laplace_debiased.operators import EigenBlock, EigenKron
from tests.operators.oracles import assert_close, matrix_power, normal, orthogonal, table

GROUPS = 3


def operators(outs: int = 2, ins: int = 4) -> tuple[EigenKron, EigenKron]:
    """The same operator as one block of groups, and as one block per group."""
    left = [orthogonal(outs, seed) for seed in range(GROUPS)]
    right = [orthogonal(ins, 10 + seed) for seed in range(GROUPS)]
    tables = table(GROUPS, outs, ins, seed=5)
    grouped = EigenBlock(torch.stack(left), torch.stack(right), tables)
    apart = tuple(map(EigenBlock, left, right, tables))
    delta = torch.tensor(0.7, dtype=torch.float64)
    return EigenKron((grouped,), delta), EigenKron(apart, delta)


@pytest.mark.parametrize("outs", [1, 2])
def test_groups_are_a_direct_sum(outs: int) -> None:
    grouped, apart = operators(outs)
    vectors = normal(5, 2, grouped.n_params, seed=1)
    assert grouped.n_params == apart.n_params == GROUPS * outs * 4
    assert_close(grouped.logdet(), apart.logdet())
    assert_close(grouped.diag(-1), apart.diag(-1))
    assert_close(grouped.bmm(vectors, -0.5), apart.bmm(vectors, -0.5))
    assert_close(grouped.inv_square_form(vectors), apart.inv_square_form(vectors))
    assert_close(grouped.to_matrix(), apart.to_matrix())


def test_powers_are_those_of_the_dense_matrix() -> None:
    grouped, _ = operators()
    assert_close(grouped.to_matrix(-0.5), matrix_power(grouped.to_matrix(), -0.5))


def test_groups_have_two_factors_in_the_hosts_lists() -> None:
    (pair,) = operators()[0].eigenvectors
    assert [tuple(basis.shape) for basis in pair if basis is not None] == [(3, 2, 2), (3, 4, 4)]
