"""The low-rank posterior against dense matrices and laplace-torch's FullLaplace."""

from __future__ import annotations

import pytest
import torch
from laplace import Laplace

from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.posterior import DebiasedLowRankLaplace
from tests.data.toys import plan_from_loader
from tests.lowrank.problems import (
    ARCHITECTURES,
    Case,
    along,
    case,
    double_by_default,
    eigenvectors,
    ggn,
)
from tests.tolerances import relative_error

N = 8
FIRST, SECOND = slice(0, 4), slice(4, 8)


def fitted(c: Case, *, fit: dict | None = None, **options) -> DebiasedLowRankLaplace:
    la = DebiasedLaplace(c.model, c.likelihood, hessian_structure="lowrank", **options)
    la.fit(c.loader(), **({"n_samples": None} if fit is None else fit))
    return la


def two_loaders(c: Case, **options) -> DebiasedLowRankLaplace:
    la = DebiasedLaplace(c.model, c.likelihood, hessian_structure="lowrank", **options)
    la.fit(c.loader(FIRST), magnitude_loader=c.loader(SECOND), n_data=N)
    return la


def curvature(la: DebiasedLowRankLaplace) -> torch.Tensor:
    """The posterior's likelihood part, summed over N."""
    return along(*la.H)


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_single_with_every_direction_is_the_dense_ggn(kind, likelihood):
    c = case(kind, likelihood)
    la = fitted(c, scheme="single")
    assert relative_error(curvature(la), N * ggn(c)) < 1e-8
    values, _ = eigenvectors(ggn(c))
    # Dense eigenvalues near the cutoff are rounding noise of the dense matrix.
    clear = values > 1e-10 * values[0]
    assert relative_error(la.H[1][: len(values)][clear[: la.rank]], N * values[clear]) < 1e-8


@pytest.mark.parametrize("prior", [0.25, torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_single_equals_laplace_torchs_full_posterior(likelihood, prior):
    c = case("mlp", likelihood)
    kwargs = {"prior_precision": prior, "temperature": 0.5}  # exact in float32, which the host uses
    if likelihood == "regression":
        kwargs["sigma_noise"] = 0.5
    la = fitted(c, scheme="single", **kwargs)
    with double_by_default():
        full = Laplace(c.model, likelihood, "all", "full", **kwargs)
        full.fit(c.loader())
    operator = la.precision_operator
    assert relative_error(operator.to_matrix(), full.posterior_precision) < 1e-8
    root = operator.sqrt_solve(torch.eye(la.n_params, dtype=torch.float64)).T
    assert relative_error(root @ root.T, full.posterior_covariance) < 1e-8
    for name in ("log_det_posterior_precision", "log_det_ratio", "scatter", "log_likelihood"):
        assert relative_error(getattr(la, name), getattr(full, name)) < 1e-8, name
    assert relative_error(la.log_marginal_likelihood(), full.log_marginal_likelihood()) < 1e-8
    value = la.mean + torch.linspace(-1, 1, la.n_params, dtype=torch.float64)
    assert relative_error(la.log_prob(value), full.log_prob(value)) < 1e-8
    rows = torch.randn(3, 3, la.n_params, dtype=torch.float64)
    assert relative_error(la.functional_variance(rows), full.functional_variance(rows)) < 1e-8
    assert relative_error(la.functional_covariance(rows), full.functional_covariance(rows)) < 1e-8


def test_marginal_likelihood_has_the_full_posteriors_gradient():
    c = case("mlp", "regression")
    la = fitted(c, scheme="single")
    with double_by_default():
        full = Laplace(c.model, "regression", "all", "full")
        full.fit(c.loader())
    gradients = []
    for posterior in (la, full):
        prior = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
        sigma = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
        value = posterior.log_marginal_likelihood(prior, sigma)
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(value, [prior, sigma])])
        )
    assert relative_error(*gradients) < 1e-8


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("kind", ["mlp", "cnn with BatchNorm", "transformer"])
def test_two_batch_measures_one_batchs_directions_on_the_other(kind, rank):
    c = case(kind)
    _, basis = eigenvectors(ggn(c, FIRST), rank)
    magnitudes = torch.diagonal(basis.T @ ggn(c, SECOND) @ basis)
    la = two_loaders(c, scheme="two_batch", rank=rank)
    assert relative_error(curvature(la), N * along(basis, magnitudes)) < 1e-8


def test_cross_fit_averages_the_folds_as_matrices():
    c = case()
    expected = torch.zeros_like(ggn(c))
    for directions, measured in ((FIRST, SECOND), (SECOND, FIRST)):
        _, basis = eigenvectors(ggn(c, directions))
        core = basis.T @ ggn(c, measured) @ basis
        expected += 0.5 * basis @ core.diagonal().diag() @ basis.T
    la = two_loaders(c, scheme="cross_fit")
    assert relative_error(curvature(la), N * expected) < 1e-8


@pytest.mark.parametrize(("folds", "n_samples"), [(2, 8), (2, 6), (3, 6)])
def test_cross_fit_counts_its_own_samples_where_the_pool_is_finite(folds, n_samples):
    c = case()
    plan = plan_from_loader(c.loader(), folds=folds, n_samples=n_samples, seed=3)
    expected = torch.zeros_like(ggn(c))
    for k, held_out in enumerate(plan.indices):
        own = torch.cat([plan.indices[j] for j in range(folds) if j != k])
        _, basis = eigenvectors(ggn(c, own))
        # Samples that were seen are known exactly; the held-out ones stand for the rest.
        pool = (len(own) / N) * ggn(c, own) + (1 - len(own) / N) * ggn(c, held_out)
        expected += along(basis, torch.diagonal(basis.T @ pool @ basis)) / folds
    options = {"scheme": "cross_fit", "folds": folds, "sampling": "uniform"}
    la = fitted(c, fit={"n_samples": n_samples, "seed": 3}, **options)
    assert relative_error(curvature(la), N * expected) < 1e-8


@pytest.mark.parametrize("options", [{}, {"scheme": "two_batch", "fisher": "mc"}])
def test_both_routes_agree(options):
    c = case()
    gram = fitted(c, fit={"n_samples": 6}, rank=3, **options)
    lanczos = fitted(c, fit={"n_samples": 6}, rank=3, byte_budget=900, **options)
    assert relative_error(curvature(lanczos), curvature(gram)) < 1e-7
    assert lanczos.bias_report().scale_ratio == pytest.approx(gram.bias_report().scale_ratio)


def test_nothing_depends_on_batches_or_tiles():
    c = case("cnn with BatchNorm")
    expected = curvature(fitted(c))
    la = DebiasedLowRankLaplace(c.model, byte_budget=20_000)
    la.fit(c.loader(batch_size=3), n_samples=None)
    assert la.fitted.n_samples == N
    single = fitted(c, scheme="single")
    one_by_one = DebiasedLowRankLaplace(c.model, scheme="single", byte_budget=20_000)
    one_by_one.fit(c.loader(batch_size=1), n_samples=None)
    assert relative_error(curvature(one_by_one), curvature(single)) < 1e-10
    assert relative_error(curvature(la), expected) < 1e-10


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_other_fisher_types(fisher):
    c = case()
    la = fitted(c, scheme="single", fisher=fisher, mc_samples=100 if fisher == "mc" else 1)
    if fisher == "empirical":
        rows = []
        for n in range(N):
            loss = torch.nn.functional.cross_entropy(c.model(c.x[n : n + 1]), c.y[n : n + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, c.parameters)]))
        rows = torch.stack(rows)
        assert relative_error(curvature(la), rows.T @ rows) < 1e-8
    else:
        # 100 label draws per sample: a relative error of about 1/√100 per sample, less on average
        # over eight; seed 0.
        assert relative_error(curvature(la), N * ggn(c)) < 0.1


def test_adding_a_fit_averages_matrices():
    c = case()
    la = DebiasedLaplace(c.model, hessian_structure="lowrank", scheme="single")
    la.fit(c.loader(FIRST), n_samples=None)
    la.fit(c.loader(SECOND), n_samples=None, override=False)
    assert la.n_data == N
    assert relative_error(curvature(la), N * ggn(c)) < 1e-8
    budgeted = DebiasedLaplace(c.model, hessian_structure="lowrank", scheme="single")
    budgeted.fit(c.loader(), n_samples=4)
    budgeted.fit(c.loader(), n_samples=4, override=False)
    assert budgeted.n_data == N
    assert relative_error(curvature(budgeted), N * ggn(c)) < 1e-8  # the other four were drawn


def test_samples_have_the_posteriors_mean_and_covariance():
    la = fitted(case(), prior_precision=2.0)
    n_samples = 40_000
    draws = la.sample(n_samples, torch.Generator().manual_seed(0)) - la.mean
    covariance = torch.linalg.inv(la.precision_operator.to_matrix())
    # Norm-wise error of a sample covariance: about tr(Σ)/(‖Σ‖_F √n); seed 0, three times that.
    scale = float(covariance.trace() / covariance.norm()) / n_samples**0.5
    assert relative_error(draws.T @ draws / n_samples, covariance) < 3 * scale
    assert float((draws.mean(0) / covariance.diagonal().sqrt()).abs().max()) < 5 / n_samples**0.5


def test_bias_report_compares_own_with_other_curvature():
    c = case()
    values, basis = eigenvectors(ggn(c, FIRST))
    other = torch.diagonal(basis.T @ ggn(c, SECOND) @ basis)
    report = two_loaders(c, scheme="two_batch").bias_report()
    assert report.scale_ratio == pytest.approx(float(values.sum() / other.sum()), rel=1e-6)
    with pytest.raises(ValueError, match="single"):
        fitted(c, scheme="single").bias_report()
