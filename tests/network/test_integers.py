"""Integers of numpy are integers, and a seed that cannot be one is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace, directional_profile
from laplace_debiased.checks import checked_integer, generator_seed
from laplace_debiased.diagnostics import kfac_profile
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.options import CurvatureOptions
from tests.zoo import problem

P = problem("mlp")
BATCHES = (P.x[:5], P.y[:5]), (P.x[5:10], P.y[5:10])
KINDS = [np.int64, np.uint8, np.int32]


def posterior(kind: Any, **fit: Any) -> DebiasedLaplace:
    la = DebiasedLaplace(P.model, folds=kind(3), mc_samples=kind(2), fisher="mc")
    la.fit(P.loader(), n_samples=kind(12), n_data=kind(26), seed=kind(3), **fit)
    return la


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_of_numpys_integers_is_that_of_pythons(kind: Any) -> None:
    la, expected = posterior(kind), posterior(int)
    assert torch.equal(la(P.x), expected(P.x))
    for one in (la, expected):
        number = kind if one is la else int
        one.optimize_prior_precision(
            val_loader=P.loader(),
            grid_size=number(3),
            link_approx="mc",
            n_samples=number(7),
            seed=number(5),
        )
    assert la.tuning_result == expected.tuning_result
    la.optimize_prior_precision(method="marglik", n_steps=kind(2))
    expected.optimize_prior_precision(method="marglik", n_steps=2)
    assert torch.equal(la.prior_precision, expected.prior_precision)


def test_options_hold_plain_integers() -> None:
    options = CurvatureOptions(
        sampling="uniform",
        mc_samples=np.int64(2),
        folds=np.int64(3),
        pool_size=np.int64(9),
        byte_budget=np.int64(8),
    )
    for name in ("mc_samples", "folds", "pool_size", "byte_budget"):
        assert type(getattr(options, name)) is int


def test_diagnostics_take_numpys_integers() -> None:
    first, second = BATCHES
    profile = directional_profile(
        P.model, "classification", first, second, k=np.int64(3), seed=np.int64(1)
    )
    assert profile.n_directions == 3
    assert kfac_profile(P.model, "classification", first, second, n_bands=np.int64(4)).blocks


@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, np.float64(2.0), "2", None, 0, -1])
def test_what_is_no_positive_integer_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="rank must be a positive integer; got"):
        checked_integer("rank", value)
    with pytest.raises(ValueError, match="folds must be an integer of at least 2"):
        CurvatureOptions(folds=value, sampling="uniform")


@pytest.mark.parametrize("seed", [2**64, 2**70, -(2**63) - 1])
def test_a_seed_out_of_range_is_named(seed: int) -> None:
    la = DebiasedLaplace(P.model)
    la.fit(P.loader())
    before = torch.get_rng_state()
    for call in (
        lambda: generator_seed(seed),
        lambda: la.fit(P.loader(), seed=seed),
        lambda: la.optimize_prior_precision(val_loader=P.loader(), seed=seed),
        lambda: directional_profile(P.model, "classification", *BATCHES, seed=seed),
    ):
        with pytest.raises(
            ValueError, match=rf"seed must lie in -2\*\*63\.\.2\*\*64 - 1, got {seed}"
        ):
            call()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match=r"seed must be an int, got 1\.5"):
        la.optimize_prior_precision(val_loader=P.loader(), seed=1.5)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), -1])
def test_the_extreme_seeds_work_for_every_generator(seed: int) -> None:
    la = DebiasedLaplace(P.model, fisher="mc")
    la.fit(P.loader(), n_samples=12, seed=seed)
    la.optimize_prior_precision("nn", val_loader=P.loader(), grid_size=2, n_samples=2, seed=seed)
    options = {"solver": "lanczos", "k": 2, "seed": seed}
    assert directional_profile(P.model, "classification", *BATCHES, **options).n_directions == 2


def test_preserved_generators_are_seeded_alike_by_numpys_integers() -> None:
    def drawn(seed: Any) -> tuple[float, float]:
        with preserved_rng(seed):
            return float(torch.rand(())), float(np.random.rand())

    assert drawn(np.int64(4)) == drawn(4)


@pytest.mark.parametrize("seed", [np.int64(3), -3, 2**63])
def test_any_seed_starts_a_low_rank_fit_by_lanczos(seed: int) -> None:
    p = problem("mlp", n=40)
    options = {"rank": np.int64(2), "byte_budget": 2000, "ignore_index": np.int64(-1)}
    la = DebiasedLaplace(p.model, hessian_structure="lowrank", **options)
    la.fit(p.loader(), n_samples=None, seed=seed)
    assert la.rank == 2


class Indexed(nn.Sequential):
    """A network whose first parameter is no real one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(nn.Linear(4, 3))
        self._parameters = {
            "index": nn.Parameter(torch.ones(2).to(dtype), requires_grad=False),
            **self._parameters,
        }


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_parameter_that_is_no_real_one_gives_no_dtype(dtype: torch.dtype) -> None:
    model = Indexed(dtype).double()
    assert next(model.parameters()).dtype == dtype
    la = DebiasedLaplace(model, prior_precision=0.7)
    x = torch.randn(12, 4, dtype=torch.float64)
    la.fit(DataLoader(TensorDataset(x, torch.arange(12) % 3)))
    assert la.prior_precision.tolist() == [0.7]
    assert la.mean.dtype == la(x).dtype == torch.float64
