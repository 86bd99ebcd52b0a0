"""Schemes as data, and the tensor algebra of bases and tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from laplace_debiased.curvature import BlockFactors, KroneckerFactors
from laplace_debiased.debiasing.bases import eigenbasis, kfac_magnitudes, own_magnitudes
from laplace_debiased.debiasing.schemes import join_by_rank, scheme_plan
from laplace_debiased.errors import NumericalError
from laplace_debiased.options import Scheme
from tests.tolerances import assert_exact


def factors(seed: int, samples: int = 10, dtype: torch.dtype = torch.float64) -> KroneckerFactors:
    g = torch.Generator().manual_seed(seed)

    def covariance(size: int) -> torch.Tensor:
        rows = torch.randn(20, size, generator=g, dtype=torch.float64)
        return (rows.T @ rows / 20).to(dtype)

    blocks = (
        BlockFactors("weight", covariance(3), covariance(4)),
        BlockFactors("bias", covariance(3)),
    )
    return KroneckerFactors(blocks, samples)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_cross_fit_measures_every_fold_once_along_the_others(sizes: list[int]) -> None:
    plan = scheme_plan(Scheme.CROSS_FIT, tuple(sizes))
    folds = set(range(len(sizes)))
    assert sorted(k for step in plan.measurements for k in step.magnitude_folds) == sorted(folds)
    for step in plan.measurements:
        assert set(step.direction_folds) == folds - set(step.magnitude_folds)
        assert step.share == pytest.approx(sizes[step.magnitude_folds[0]] / sum(sizes))
    assert sum(step.share for step in plan.measurements) == pytest.approx(1.0)
    assert set(plan.posterior_folds) == folds


def test_two_batch_and_single() -> None:
    plan = scheme_plan(Scheme.TWO_BATCH, (3, 5))
    (step,) = plan.measurements
    assert (step.direction_folds, step.magnitude_folds) == ((0,), (1,))
    assert plan.posterior_folds == (0,)
    plan = scheme_plan(Scheme.SINGLE, (8,))
    (step,) = plan.measurements
    assert step.direction_folds == step.magnitude_folds == plan.posterior_folds == (0,)


def test_eigenbasis_diagonalises_every_factor_ascending() -> None:
    given_factors = factors(0)
    for basis, block in zip(eigenbasis(given_factors), given_factors.blocks, strict=True):
        u, values = basis.output_basis, basis.output_eigenvalues
        assert_exact(u @ torch.diag(values) @ u.T, block.output)
        assert bool((values.diff() >= 0).all())
        if block.input is not None:
            assert basis.input_basis is not None
            v, values = basis.input_basis, basis.input_eigenvalues
            assert_exact(v @ torch.diag(values) @ v.T, block.input)


def test_kfac_magnitudes_are_the_dense_kroneckers_diagonal() -> None:
    basis, other = eigenbasis(factors(0)), factors(1)
    tables = kfac_magnitudes(basis, other)
    weight, bias = other.blocks
    u = torch.kron(basis[0].output_basis.contiguous(), basis[0].input_basis.contiguous())
    dense = torch.kron(weight.output, weight.input)
    assert_exact(tables[0].flatten(), (u.T @ dense @ u).diagonal())
    assert_exact(tables[1], (basis[1].output_basis.T @ bias.output @ basis[1].output_basis).diag())


def test_own_factors_give_their_own_eigenvalues() -> None:
    given_factors = factors(0)
    basis = eigenbasis(given_factors)
    for own, measured in zip(
        own_magnitudes(basis), kfac_magnitudes(basis, given_factors), strict=True
    ):
        assert_exact(measured, own)


def test_merging_is_the_mean_over_the_union() -> None:
    one, two = factors(0, 30), factors(1, 10)
    merged = KroneckerFactors.merge([one, two])
    assert merged.n_samples == 40
    for a, b, both in zip(one.blocks, two.blocks, merged.blocks, strict=True):
        assert_exact(both.output, 0.75 * a.output + 0.25 * b.output)
    with pytest.raises(ValueError, match="different parameters"):
        KroneckerFactors.merge([one, KroneckerFactors(two.blocks[:1], 10)])


def test_join_averages_equal_ranks() -> None:
    tables = [(torch.full((3, 4), 1.0), torch.zeros(3)), (torch.full((3, 4), 5.0), torch.ones(3))]
    bases = [eigenbasis(factors(seed)) for seed in range(3)]
    joined = join_by_rank(tables, [0.25, 0.75], bases[:2], bases[2])
    assert_exact(joined[0], torch.full((3, 4), 4.0))
    assert_exact(joined[1], torch.full((3,), 0.75))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_factor_that_is_not_finite_names_its_parameter(bad: float) -> None:
    good = factors(0).blocks[0]
    broken = BlockFactors("layer.weight", good.output * bad, good.input)
    with pytest.raises(NumericalError, match=r"'layer\.weight'"):
        eigenbasis(KroneckerFactors((broken,), 1))


def test_negative_rounding_is_clamped() -> None:
    indefinite = torch.diag(torch.tensor([-1e-18, 1.0]))
    (basis,) = eigenbasis(KroneckerFactors((BlockFactors("b", indefinite),), 1))
    assert float(basis.output_eigenvalues.min()) == 0.0


def test_decomposition_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def failing(matrix: torch.Tensor):
        if matrix.dtype is torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    given_factors = factors(0, dtype=torch.float32)
    basis = eigenbasis(given_factors)[0]
    assert basis.output_basis.dtype is torch.float32
    rebuilt = basis.output_basis @ torch.diag(basis.output_eigenvalues) @ basis.output_basis.T
    assert_exact(rebuilt, given_factors.blocks[0].output)


@pytest.mark.parametrize("n_dead", [1, 3, 6])
def test_zero_rows_of_a_factor_have_unit_eigenvectors(n_dead: int) -> None:
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = rows.T @ rows
    dead = torch.randperm(6, generator=torch.Generator().manual_seed(n_dead))[:n_dead]
    factor[dead] = 0.0
    factor[:, dead] = 0.0
    (basis,) = eigenbasis(KroneckerFactors((BlockFactors("b", factor),), 1))
    u, values = basis.output_basis, basis.output_eigenvalues
    assert u is not None
    assert_exact((u * values) @ u.T, factor)
    assert_exact(u.T @ u, torch.eye(6, dtype=torch.float64))
    assert bool((values.diff() >= -1e-12).all())
    assert bool(((u[dead] == 0) | (u[dead] == 1)).all())
