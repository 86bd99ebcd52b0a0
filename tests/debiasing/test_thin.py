"""Factors that lack rank: their eigenbases, magnitudes along them, and joining by rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laplace_debiased.curvature import BlockFactors, KroneckerFactors
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.curvature.rows.gram import RowsFactor
from laplace_debiased.curvature.rows.sides import multiplicities
from laplace_debiased.debiasing.bases import eigenbasis, kfac_magnitudes, own_magnitudes
from laplace_debiased.debiasing.schemes import join_by_rank
from tests.tolerances import assert_exact, assert_same


def rows(k: int, size: int, seed: int, *lead: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, k, size, dtype=torch.float64, generator=g)


def weight(output: Tensor | RowsFactor, inputs: Tensor | RowsFactor) -> KroneckerFactors:
    return KroneckerFactors((BlockFactors("weight", output, inputs),), 4)


def thin_factors(seed: int, k: int = 3, k_in: int = 2) -> KroneckerFactors:
    return weight(RowsFactor(rows(k, 5, seed)), RowsFactor(rows(k_in, 7, seed + 50)))


def counts(block: BlockBasis) -> Tensor:
    return torch.outer(multiplicities(block.output_basis), multiplicities(block.input_basis))


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_rows_give_the_leading_eigenpairs_of_their_matrix(k: int, dtype: torch.dtype) -> None:
    r = rows(k, 6, 0).to(dtype)
    (block,) = eigenbasis(KroneckerFactors((BlockFactors("b", RowsFactor(r)),), 1))
    values = torch.linalg.eigvalsh(r.double().T @ r.double()).to(dtype)
    assert block.output_basis.shape == (6, k)
    assert_exact(block.output_eigenvalues, torch.cat([values[-k:], torch.zeros(1, dtype=dtype)]))
    u = block.output_basis
    assert_exact(u.T @ u, torch.eye(k, dtype=dtype))
    assert_exact((u * block.output_eigenvalues[:-1]) @ u.T, r.T @ r)


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_bases_are_orthonormal_however_small_the_eigenvalues(scale: float) -> None:
    r = rows(4, 9, 1) * torch.tensor([1.0, scale, 0.1, scale]).reshape(-1, 1)
    (block,) = eigenbasis(KroneckerFactors((BlockFactors("b", RowsFactor(r)),), 1))
    u = block.output_basis
    assert float((u.T @ u - torch.eye(4)).abs().max()) < 1e-12
    assert_exact(projector(u), projector(torch.linalg.qr(r.T).Q))


def test_repeated_rows_and_dead_layers_have_no_direction() -> None:
    r = torch.cat([rows(2, 6, 2), rows(2, 6, 2)])
    (block,) = eigenbasis(KroneckerFactors((BlockFactors("b", RowsFactor(r)),), 1))
    assert block.output_basis.shape == (6, 2)
    (dead,) = eigenbasis(KroneckerFactors((BlockFactors("b", RowsFactor(0 * r)),), 1))
    assert dead.output_basis.shape == (6, 0)
    assert torch.equal(dead.output_eigenvalues, torch.zeros(1, dtype=torch.float64))


def test_groups_of_different_rank_share_one_shape() -> None:
    r = rows(3, 6, 3, 2)
    r[1, 2] = r[1, 1]
    (block,) = eigenbasis(KroneckerFactors((BlockFactors("b", RowsFactor(r)),), 1))
    assert multiplicities(block.output_basis).tolist() == [[1, 1, 1, 3], [0, 1, 1, 4]]
    for u, values, part in zip(block.output_basis, block.output_eigenvalues, r, strict=True):
        assert_exact((u * values[:-1]) @ u.T, part.T @ part)


@pytest.mark.parametrize("dense", [False, True])
def test_a_cap_keeps_the_leading_directions_and_the_trace(dense: bool) -> None:
    r = rows(5, 6, 4)
    factor = r.T @ r if dense else RowsFactor(r)
    (block,) = eigenbasis(KroneckerFactors((BlockFactors("b", factor),), 1), max_rank=2)
    values, vectors = torch.linalg.eigh(r.T @ r)
    assert_exact(block.output_eigenvalues[:-1], values[-2:])
    assert_exact(block.output_eigenvalues[-1], values[:-2].mean())
    assert_exact(projector(block.output_basis), projector(vectors[:, -2:]))
    sums = multiplicities(block.output_basis) @ block.output_eigenvalues
    assert_exact(sums, (r.T @ r).trace())


@pytest.mark.parametrize("dense", [False, True])
def test_kfac_magnitudes_are_the_means_over_the_complement(dense: bool) -> None:
    (basis,), held = eigenbasis(thin_factors(5)), thin_factors(6)
    output, inputs = held.blocks[0].output.dense(), held.blocks[0].input.dense()
    (table,) = kfac_magnitudes((basis,), weight(output, inputs) if dense else held)
    for index, (u, m) in enumerate(((basis.output_basis, output), (basis.input_basis, inputs))):
        outside = torch.eye(len(u), dtype=u.dtype) - projector(u)
        mean = (outside @ m).trace() / (len(u) - u.shape[1])
        forms = torch.cat([(u.T @ m @ u).diagonal(), mean.reshape(1)])
        assert_exact(table.sum(1 - index) / table.sum(), forms / forms.sum())
    assert_exact((counts(basis) * table).sum(), output.trace() * inputs.trace())


def test_own_magnitudes_are_measured_on_the_own_factors() -> None:
    own = thin_factors(7)
    basis = eigenbasis(own)
    for mine, measured in zip(own_magnitudes(basis), kfac_magnitudes(basis, own), strict=True):
        assert_exact(mine, measured)
        assert torch.equal(mine[-1], torch.zeros_like(mine[-1]))


def test_joining_aligns_leading_directions_and_keeps_the_trace() -> None:
    folds = [thin_factors(8, 1, 4), thin_factors(9, 3, 1)]
    bases = [eigenbasis(fold) for fold in folds]
    tables = [kfac_magnitudes(basis, thin_factors(10)) for basis in bases]
    for target in (
        eigenbasis(KroneckerFactors.merge(folds)),
        eigenbasis(thin_factors(11, 1, 1)),
        bases[0],
    ):
        (joined,) = join_by_rank(tables, [0.25, 0.75], bases, target)
        assert joined.shape == target[0].table_shape
        traces = [(counts(b[0]) * t[0]).sum() for b, t in zip(bases, tables, strict=True)]
        assert_exact((counts(target[0]) * joined).sum(), 0.25 * traces[0] + 0.75 * traces[1])
        assert_exact(joined[-2, -2], 0.25 * tables[0][0][-2, -2] + 0.75 * tables[1][0][-2, -2])


def test_joining_fills_missing_directions_with_the_complements_value() -> None:
    one, two = eigenbasis(thin_factors(12, 1, 1)), eigenbasis(thin_factors(13, 3, 1))
    (first,), (second,) = own_magnitudes(one), own_magnitudes(two)
    first = first + 0.1
    (joined,) = join_by_rank([(first,), (second,)], [0.5, 0.5], [one, two], two)
    expected = torch.stack([first[1], first[1], first[0], first[1]])
    assert_exact(joined, 0.5 * expected + 0.5 * second)


def test_a_whole_basis_shares_one_magnitude_where_its_factor_vanishes() -> None:
    r = rows(2, 5, 14)
    factors = KroneckerFactors((BlockFactors("b", r.T @ r),), 1)
    basis = eigenbasis(factors)
    table = torch.arange(5, dtype=torch.float64)
    (joined,) = join_by_rank([(table,)], [1.0], [basis], basis)
    assert joined.tolist() == [1.0, 1.0, 1.0, 3.0, 4.0]


def test_merging_keeps_rows_while_they_are_few() -> None:
    few, more = thin_factors(15, 2, 2), thin_factors(16, 2, 5)
    merged = KroneckerFactors.merge([few, more]).blocks[0]
    assert isinstance(merged.output, RowsFactor)
    assert isinstance(merged.input, Tensor)
    both = [part.blocks[0].output.dense() for part in (few, more)]
    assert_same(merged.output.dense(), (both[0] + both[1]) / 2)
    both = [part.blocks[0].input.dense() for part in (few, more)]
    assert_same(merged.input, (both[0] + both[1]) / 2)
