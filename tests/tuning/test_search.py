"""One-pass tuning finds what brute force finds, and never what is not a number."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor

from laplace_debiased.errors import NumericalError
from laplace_debiased.posterior import DebiasedKronLaplace
from laplace_debiased.predictive import KronPredictor
from laplace_debiased.tuning import search
from tests.tolerances import INTERPOLATED
from tests.zoo import Problem, problem

GRID = {"log_prior_prec_min": -3, "log_prior_prec_max": 4, "grid_size": 8}
POINTS = torch.logspace(-3, 4, 8, dtype=torch.float64)


def fitted(likelihood: str = "classification") -> tuple[DebiasedKronLaplace, Problem]:
    p = problem("mlp", likelihood, n=60)
    la = DebiasedKronLaplace(p.model, likelihood)
    la.fit(p.loader(slice(0, 40)))
    return la, Problem(p.model, p.x[40:], p.y[40:], likelihood)


def nll(la: DebiasedKronLaplace, p: Problem, **call: object) -> float:
    """Validation loss by ``la(x)``, as a user would write it."""
    if p.likelihood == "classification":
        probabilities = la(p.x, **call)
        return float(-probabilities[torch.arange(len(p.y)), p.y].log().mean())
    mean, covariance = la(p.x, **call)
    total = covariance.diagonal(dim1=1, dim2=2) + la.sigma_noise**2
    normal = torch.distributions.Normal(mean, total.sqrt())
    return float(-normal.log_prob(p.y).sum(-1).mean())


def quietly(la: DebiasedKronLaplace, **kwargs: object) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the best prior precision")
        la.optimize_prior_precision(**kwargs)


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm", None])
def test_losses_of_the_grid_are_those_of_la_x(link: str | None) -> None:
    la, validation = fitted("regression" if link is None else "classification")
    call = {} if link is None else {"link_approx": link, "n_samples": 256}
    quietly(la, val_loader=validation.loader(), refine=False, link_approx=link, **GRID)
    result, chosen = la.tuning_result, la.prior_precision.item()
    brute = []
    for prior in POINTS:
        la.prior_precision = prior
        brute.append(nll(la, validation, **call))
    assert result.losses == pytest.approx(brute, rel=1e-9)
    assert result.losses_by_link == ({} if link is None else {link: result.losses})
    best = float(POINTS[torch.tensor(brute).argmin()])
    assert chosen == pytest.approx(best, rel=1e-12)
    assert result.best_grid_point == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_refined_optimum_is_no_worse_and_its_loss_is_true(likelihood: str) -> None:
    la, validation = fitted(likelihood)
    quietly(la, val_loader=validation.loader(), **GRID)
    result = la.tuning_result
    assert result.loss <= min(result.losses)
    assert nll(la, validation) == pytest.approx(result.loss, rel=INTERPOLATED)
    assert la.prior_precision.item() == pytest.approx(result.prior_precision)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_of_the_validation_set_change_nothing(batch_size: int) -> None:
    la, validation = fitted()
    quietly(la, val_loader=validation.loader(), **GRID)
    expected = la.tuning_result
    quietly(la, val_loader=validation.loader(batch_size=batch_size), **GRID)
    assert la.tuning_result.losses == pytest.approx(expected.losses, rel=1e-12)


def test_metric_starts_afresh_at_every_point_and_the_users_is_left_alone() -> None:
    la, validation = fitted()
    metric = torchmetrics.classification.MulticlassCalibrationError(num_classes=3)
    metric.update(torch.eye(3), torch.tensor([0, 1, 1]))
    before = metric.compute()
    quietly(la, val_loader=validation.loader(), loss=metric, refine=False, **GRID)
    losses = la.tuning_result.losses
    assert torch.equal(metric.compute(), before)
    for prior, loss in zip(POINTS, losses, strict=True):
        la.prior_precision = prior
        fresh = torchmetrics.classification.MulticlassCalibrationError(num_classes=3)
        assert loss == pytest.approx(float(fresh(la(validation.x), validation.y)), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_what_is_not_a_number_never_wins(bad: float) -> None:
    la, validation = fitted()
    calls: list[float] = []

    def loss(probabilities: Tensor, y: Tensor) -> float:
        calls.append(0.0)
        return bad if len(calls) in (1, 4) else 10.0 - len(calls)

    options = {"loss": loss, "refine": False, "link_approx": "probit", **GRID}
    quietly(la, val_loader=validation.loader(), **options)
    assert la.prior_precision.item() == pytest.approx(float(POINTS[7]))


def test_no_finite_point_is_an_error_that_leaves_the_prior() -> None:
    la, validation = fitted()
    la.prior_precision = 3.0
    with pytest.raises(NumericalError, match="none of the 8 grid points"):
        la.optimize_prior_precision(
            val_loader=validation.loader(), loss=lambda p, y: math.nan, **GRID
        )
    assert la.prior_precision.item() == 3.0


def test_optimum_on_the_edge_warns_and_inside_does_not() -> None:
    la, validation = fitted()
    with pytest.warns(UserWarning, match="the best prior precision") as caught:
        la.optimize_prior_precision(
            val_loader=validation.loader(),
            log_prior_prec_min=-2,
            log_prior_prec_max=-1,
            grid_size=3,
        )
    assert any("end of the grid" in str(warning.message) for warning in caught)
    centre = torch.tensor(3.0)

    def loss(probabilities: Tensor, y: Tensor) -> float:
        return abs(math.log(float(la_prior()) / float(centre)))

    visited = iter([*POINTS.tolist()])

    def la_prior() -> float:
        return next(visited)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(
            val_loader=validation.loader(batch_size=99),
            loss=loss,
            refine=False,
            link_approx="mc",
            **GRID,
        )
    assert la.prior_precision.item() == pytest.approx(1.0)


def test_no_method_means_gridsearch_with_validation_data_else_marglik() -> None:
    la, validation = fitted()
    la.optimize_prior_precision()
    by_evidence = la.prior_precision.item()
    assert la.tuned_link_approx is None
    quietly(la, val_loader=validation.loader(), link_approx="bridge", **GRID)
    assert la.tuned_link_approx == "bridge"
    assert torch.equal(la(validation.x), la(validation.x, link_approx="bridge"))
    with pytest.warns(UserWarning, match="does not read val_loader"):
        la.optimize_prior_precision(method="marglik", val_loader=validation.loader())
    assert la.prior_precision.item() == pytest.approx(by_evidence, rel=1e-9)
    assert la.tuned_link_approx is None, "predictions fall back to the default link"


def test_other_link_than_the_tuned_one_warns_once() -> None:
    la, validation = fitted()
    quietly(la, val_loader=validation.loader(), link_approx="bridge", **GRID)
    with pytest.warns(UserWarning, match="tuned for link_approx='bridge'"):
        la(validation.x, link_approx="probit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la(validation.x, link_approx="probit")
        la(validation.x)


@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_marginal_likelihood_is_maximised(structure: str) -> None:
    la, _ = fitted()
    la.optimize_prior_precision(prior_structure=structure, n_steps=300)
    best = la.prior_precision.clone()
    assert len(best) == (1 if structure == "scalar" else la.n_layers)
    evidence = float(la.log_marginal_likelihood())
    for factor in (0.9, 1.1):
        for k in range(len(best)):
            scale = torch.ones_like(best)
            scale[k] = factor
            assert float(la.log_marginal_likelihood(prior_precision=best * scale)) < evidence


def test_sampled_networks_are_tuned_with_the_same_draws() -> None:
    la, validation = fitted()
    results = []
    for seed in (0, 0, 1):
        torch.rand(1)
        options = {"pred_type": "nn", "n_samples": 8, "seed": seed, **GRID}
        quietly(la, val_loader=validation.loader(), **options)
        results.append(la.tuning_result.losses)
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_a_walk_prepares_the_precision_once(monkeypatch: pytest.MonkeyPatch) -> None:
    la, validation = fitted()
    prepared: list[Tensor] = []
    prepare = KronPredictor.precision

    def counted(self: KronPredictor, h: Tensor, prior: Tensor) -> Any:
        prepared.append(prior)
        return prepare(self, h, prior)

    monkeypatch.setattr(KronPredictor, "precision", counted)
    quietly(la, val_loader=validation.loader(batch_size=3), **GRID)
    assert len(prepared) == 1


def test_moments_that_are_too_large_to_keep_leave_the_best_grid_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    la, validation = fitted()
    quietly(la, val_loader=validation.loader(), **GRID)
    kept = la.tuning_result
    monkeypatch.setattr(search, "_MAX_STORED_BYTES", 1)
    quietly(la, val_loader=validation.loader(), **GRID)
    result = la.tuning_result
    assert result.losses_by_link == kept.losses_by_link
    assert result.prior_precision == result.best_grid_point
    assert kept.loss <= result.loss == min(result.losses)
    assert kept.prior_only_loss <= result.prior_only_loss


def test_single_grid_point_is_taken() -> None:
    la, validation = fitted()
    la.optimize_prior_precision(
        val_loader=validation.loader(), grid_size=1, log_prior_prec_min=0, log_prior_prec_max=0
    )
    assert la.prior_precision.item() == 1.0
