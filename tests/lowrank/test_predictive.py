"""The predictive against dense inverses: every covariance, prior, scale and precision."""

from __future__ import annotations

import pytest
import torch

from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.posterior import DebiasedLowRankLaplace
from laplace_debiased.predictive import OutputCovariance
from tests.lowrank.problems import ARCHITECTURES, Case, case, jacobian
from tests.moments import moments, sweep
from tests.tolerances import relative_error

PRIORS = ["scalar", "layers", "diagonal"]


def set_prior(la: DebiasedLowRankLaplace, structure: str) -> None:
    sizes = {"scalar": 1, "layers": la.n_layers, "diagonal": la.n_params}
    la.prior_precision = torch.linspace(0.25, 4.0, sizes[structure], dtype=torch.float64)


def fitted(c: Case, **options) -> DebiasedLowRankLaplace:
    la = DebiasedLaplace(c.model, c.likelihood, hessian_structure="lowrank", **options)
    la.fit(c.loader(), n_samples=6)
    return la


def dense(la: DebiasedLowRankLaplace, c: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and joint covariance [m, C, m, C] from the dense precision and ordinary gradients."""
    (basis, eigenvalues), prior = la.posterior_precision
    precision = (basis * eigenvalues) @ basis.T + prior.diag()
    outputs, rows = jacobian(c.model, c.parameters, c.x)
    return outputs, torch.einsum("ncp,pq,mdq->ncmd", rows, torch.linalg.inv(precision), rows)


@pytest.mark.parametrize("structure", PRIORS)
@pytest.mark.parametrize(
    ("kind", "byte_budget"), [("mlp", 2**29), ("mlp", 6_000), ("mlp", 1), ("transformer", 2**29)]
)
def test_every_covariance_is_that_of_the_dense_posterior(kind, structure, byte_budget):
    c = case(kind, "regression", n=6)
    la = fitted(c, sigma_noise=0.5, temperature=2.0)
    set_prior(la, structure)
    object.__setattr__(la.predictor.engine, "byte_budget", byte_budget)
    outputs, joint = dense(la, c)
    per_sample = torch.einsum("ncnd->ncd", joint)
    mean, variance = moments(la, c.x, OutputCovariance.DIAGONAL)
    assert relative_error(mean, outputs) < 1e-12
    assert relative_error(variance, per_sample.diagonal(dim1=1, dim2=2)) < 1e-9
    assert relative_error(la(c.x)[1], per_sample) < 1e-9
    mean, covariance = la(c.x, joint=True)
    assert relative_error(covariance, joint.reshape(len(mean), len(mean))) < 1e-9


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_all_architectures_predict(kind):
    c = case(kind)
    la = fitted(c)
    expected = torch.einsum("ncnd->ncd", dense(la, c)[1])
    assert relative_error(la._glm_predictive_distribution(c.x)[1], expected) < 1e-9
    for call in ({}, {"link_approx": "mc"}, {"link_approx": "bridge"}, {"pred_type": "nn"}):
        probabilities = la(c.x, n_samples=5, **call)
        assert torch.allclose(probabilities.sum(-1), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_sweep_gives_what_each_prior_gives_alone(diagonal):
    c = case("cnn with BatchNorm")
    la = fitted(c, temperature=0.5)
    priors = torch.logspace(-4, 4, 5, dtype=torch.float64)
    outputs, swept = sweep(la, c.x, priors, diagonal)
    kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
    for prior, covariance in zip(priors, swept, strict=True):
        la.prior_precision = prior
        mean, expected = moments(la, c.x, kind)
        assert relative_error(covariance, expected) < 1e-12
        assert relative_error(outputs, mean) < 1e-12


@pytest.mark.parametrize("structure", PRIORS)
def test_float32_variances_survive_a_tiny_prior_precision(structure):
    # Curvature pins every output down: a difference of prior and reduction would be rounding noise.
    wide, narrow = case("mlp", "regression", n=24), case("mlp", "regression", n=24)
    single = {"scheme": "single"}
    narrow.model.float()
    narrow = Case(narrow.model, narrow.x.float(), narrow.y.float(), "regression")
    variances = []
    for c in (wide, narrow):
        la = DebiasedLaplace(c.model, "regression", hessian_structure="lowrank", **single)
        la.fit(c.loader(), n_samples=None)
        assert la.rank == la.n_params
        set_prior(la, structure)
        la.prior_precision = la.prior_precision * 1e-6
        variances.append(moments(la, c.x, OutputCovariance.DIAGONAL)[1])
    assert relative_error(variances[1], variances[0]) < 1e-3
    assert bool((variances[1] > 0).all())


def test_predictions_are_differentiable_in_the_inputs():
    c = case("mlp", "regression", n=4)
    la = fitted(
        Case(c.model, c.x.repeat(2, 1), c.y.repeat(2, 1), "regression"), enable_backprop=True
    )
    x = c.x[:2].clone().requires_grad_()
    for kind in OutputCovariance:
        assert torch.autograd.gradcheck(lambda inputs, k=kind: moments(la, inputs, k), (x,))


def test_variance_falls_to_the_priors_outside_of_the_data():
    # With no direction left, the variance is the prior's: exact.
    c = case()
    la = fitted(c, rank=1, prior_precision=0.5)
    rows = jacobian(c.model, c.parameters, c.x)[1]
    inside = (rows @ la.H[0]).squeeze(-1)
    expected = (rows.square().sum(-1) - inside.square()) / 0.5 + inside.square() / (0.5 + la.H[1])
    assert relative_error(moments(la, c.x, OutputCovariance.DIAGONAL)[1], expected) < 1e-10
