"""Blocks with thin sides against the dense matrix with the complement's value spread over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_debiased.operators import EigenBlock, EigenKron
from tests import oracles
from tests.tolerances import assert_exact


def basis(size: int, rank: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=g)).Q


def table(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return 0.1 + torch.rand(*shape, dtype=torch.float64, generator=g)


def uneven_groups() -> EigenBlock:
    """Groups of ranks 2 and 1: the second has a column of zeros, with its complement's value."""
    left = torch.stack([basis(5, 2, 20), torch.cat([torch.zeros(5, 1), basis(5, 1, 21)], 1)])
    values = table(2, 3, 4)
    values[1, 0] = values[1, -1]
    return EigenBlock(left, torch.stack([basis(4, 4, 22), basis(4, 4, 23)]), values)


BLOCKS = {
    "inputs": EigenBlock(basis(3, 3, 0), basis(6, 2, 1), table(3, 3)),
    "outputs": EigenBlock(basis(5, 2, 2), basis(3, 3, 3), table(3, 3)),
    "both": EigenBlock(basis(5, 1, 4), basis(6, 4, 5), table(2, 5)),
    "vector": EigenBlock(basis(6, 2, 6), None, table(3)),
    "rank zero": EigenBlock(basis(4, 0, 7), basis(3, 1, 8), table(1, 2)),
    "embedding": EigenBlock(None, basis(5, 2, 9), table(7, 3)),
    "groups": EigenBlock(
        torch.stack([basis(3, 2, 10), basis(3, 2, 11)]),
        torch.stack([basis(4, 1, 12), basis(4, 1, 13)]),
        table(2, 3, 2),
    ),
    "uneven groups": uneven_groups(),
}
DELTAS = torch.tensor([0.3, 2.0], dtype=torch.float64)


def operators(name: str) -> tuple[EigenKron, Tensor]:
    """2.5 Λ + δ of a thin block beside a whole one, and its dense matrix."""
    other = EigenBlock(basis(2, 2, 30), basis(3, 3, 31), table(2, 3))
    kron = EigenKron((BLOCKS[name], other)) * 2.5 + DELTAS
    return kron, oracles.dense_precision(kron, DELTAS)


def power(dense: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(dense)
    return (vectors * values.pow(exponent)) @ vectors.T


@pytest.mark.parametrize("name", BLOCKS)
def test_values_per_direction_are_the_dense_matrixs_eigenvalues(name: str) -> None:
    kron, dense = operators(name)
    values = [d + b.per_direction() for b, d in zip(kron.blocks, DELTAS, strict=True)]
    assert_exact(torch.cat(values).sort().values, torch.linalg.eigvalsh(dense))


@pytest.mark.parametrize("name", BLOCKS)
def test_all_methods_are_the_dense_matrixs(name: str) -> None:
    kron, dense = operators(name)
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 3, kron.n_params, dtype=torch.float64, generator=g)
    assert kron.n_params == len(dense)
    assert_exact(kron.logdet(), torch.logdet(dense))
    for exponent in (-1, -0.5, 0.5, 2):
        expected = power(dense, exponent)
        assert_exact(kron.bmm(vectors, exponent), vectors @ expected)
        assert_exact(kron.to_matrix(exponent), expected)
        assert_exact(kron.diag(exponent), expected.diagonal())
    inverse = torch.linalg.inv(dense)
    assert_exact(kron.inv_square_form(vectors), vectors @ inverse @ vectors.mT)


@pytest.mark.parametrize("name", BLOCKS)
def test_multiplicities_sum_to_the_parameters_and_keep_the_trace(name: str) -> None:
    kron, dense = operators(name)
    block = kron.blocks[0]
    counts = block.multiplicities()
    assert float(counts.sum()) == block.n_params
    trace = (counts * (block.eigenvalues + DELTAS[0])).sum()
    assert_exact(trace, dense[: block.n_params, : block.n_params].trace())


def test_gradients_reach_deltas_and_scale() -> None:
    block = BLOCKS["both"]
    deltas = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((EigenKron((block,)) + deltas).logdet(), deltas)
    values = block.multiplicities() / (block.eigenvalues + 0.7)
    assert_exact(gradient, values.sum().reshape(1))
