"""What a laplace-torch user does with a posterior works for every scheme and magnitude."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.utils.data import ConcatDataset, DataLoader, Subset

from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.tolerances import (
    FINITE_DIFFERENCE,
    SIGMAS,
    assert_exact,
    assert_same,
    deviation,
    relative_error,
)
from tests.zoo import Problem, problem

COMBINATIONS = [
    (scheme, magnitudes)
    for scheme in ("single", "two_batch", "cross_fit")
    for magnitudes in ("kfac", "ggn")
]
LIKELIHOODS = ["classification", "regression"]
pytestmark = pytest.mark.parametrize(("scheme", "magnitudes"), COMBINATIONS)


def posterior(
    p: Problem, scheme: str, magnitudes: str, *, fit: bool = True, **options: object
) -> DebiasedKronLaplace:
    la = DebiasedKronLaplace(p.model, p.likelihood, scheme=scheme, magnitudes=magnitudes, **options)
    if fit:
        la.fit(p.loader())
    return la


def everything(la: DebiasedKronLaplace, x: Tensor) -> list[Tensor]:
    """All numbers that a user can ask for."""
    g = torch.Generator().manual_seed(0)
    predictions = la(x) if la.likelihood == "regression" else (la(x),)
    return [
        la.mean,
        la.posterior_precision.to_matrix(),
        la.log_marginal_likelihood().reshape(1),
        la.sample(2, g),
        *predictions,
    ]


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_precision_is_symmetric_positive_definite_and_dense(
    scheme: str, magnitudes: str, likelihood: str
) -> None:
    p = problem("mlp", likelihood)
    extra = {"sigma_noise": 0.4} if likelihood == "regression" else {}
    la = posterior(p, scheme, magnitudes, temperature=2.5, prior_precision=0.2, **extra)
    actual = la.posterior_precision.to_matrix()
    h = 1 / (float(la.sigma_noise) ** 2 * 2.5)
    assert_exact(actual, oracles.dense_precision(la.H, la.prior_precision, h))
    assert float(torch.linalg.eigvalsh(actual).min()) >= 0.2 * (1 - 1e-9)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_jacobian_methods_are_the_dense_ones(scheme: str, magnitudes: str, likelihood: str) -> None:
    p = problem("mlp", likelihood)
    la = posterior(p, scheme, magnitudes)
    jac = oracles.jacobian(p.model, p.x[:4], la.coverage.covered)
    covariance = torch.linalg.inv(la.posterior_precision.to_matrix())
    assert_exact(la.functional_variance(jac), jac @ covariance @ jac.mT)
    flat = jac.flatten(0, 1)
    assert_exact(la.functional_covariance(jac), flat @ covariance @ flat.T)


def test_density_is_the_gaussians(scheme: str, magnitudes: str) -> None:
    p = problem("mlp")
    la = posterior(p, scheme, magnitudes, prior_precision=2.0)
    normal = MultivariateNormal(la.mean, precision_matrix=la.posterior_precision.to_matrix())
    value = la.mean + 0.1 * torch.arange(la.n_params) / la.n_params
    assert_exact(la.log_prob(value), normal.log_prob(value))
    delta = value - la.mean
    expected = delta @ la.posterior_precision.to_matrix() @ delta
    assert_exact(la.square_norm(value), expected)
    assert_exact(la.log_prob(value, normalized=False), -0.5 * expected)


def test_samples_have_the_posteriors_moments(scheme: str, magnitudes: str) -> None:
    """Seed 0, 4 000 samples whitened by the dense root: 43 means and variances at 4.5 σ."""
    la = posterior(problem("mlp"), scheme, magnitudes)
    before = torch.get_rng_state()
    samples = la.sample(4000, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    root = torch.linalg.cholesky(la.posterior_precision.to_matrix())
    white = (samples - la.mean) @ root
    assert float(deviation(white, 0.0).max()) <= SIGMAS + 1.5
    assert float(deviation(white.square(), 1.0).max()) <= SIGMAS + 1.5


@pytest.mark.parametrize("link", ["probit", "mc", "bridge", "bridge_norm"])
def test_classification_predictions_are_distributions(
    scheme: str, magnitudes: str, link: str
) -> None:
    p = problem("mlp")
    la, g = posterior(p, scheme, magnitudes), torch.Generator().manual_seed(0)
    for diagonal in (False, True):
        probabilities = la(p.x, link_approx=link, diagonal_output=diagonal, generator=g)
        assert probabilities.shape == (26, 3)
        assert_same(probabilities.sum(-1), torch.ones(26, dtype=torch.float64))
        assert bool((probabilities > 0).all())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_shapes_of_all_predictions(scheme: str, magnitudes: str, likelihood: str) -> None:
    p = problem("mlp", likelihood)
    la, g = posterior(p, scheme, magnitudes), torch.Generator().manual_seed(0)
    for pred_type in ("glm", "nn"):
        for draw in (la.predictive_samples, la.functional_samples):
            for diagonal in (False, True):
                samples = draw(p.x, pred_type, 7, diagonal, generator=g)
                assert samples.shape == (7, 26, 3)
    if likelihood == "regression":
        assert [t.shape for t in la(p.x)] == [(26, 3), (26, 3, 3)]
        assert [t.shape for t in la(p.x, diagonal_output=True)] == [(26, 3), (26, 3)]
        assert [t.shape for t in la(p.x, joint=True)] == [(78,), (78, 78)]
        networks = la(p.x, pred_type="nn", n_samples=3, generator=g)
        assert [t.shape for t in networks] == [(26, 3), (26, 3)]
    else:
        assert la(p.x, pred_type="nn", n_samples=3, generator=g).shape == (26, 3)
        samples = la.predictive_samples(p.x, n_samples=3, generator=g)
        assert_same(samples.sum(-1), torch.ones(3, 26, dtype=torch.float64))


def test_fitting_twice_replaces_the_fit(scheme: str, magnitudes: str) -> None:
    p = problem("mlp")
    la = posterior(p, scheme, magnitudes, fit=False)
    la.fit(p.loader(slice(0, 10)))
    la.fit(p.loader())
    expected = posterior(p, scheme, magnitudes)
    for a, b in zip(everything(la, p.x), everything(expected, p.x), strict=True):
        assert torch.equal(a, b)
    assert la.n_data == 26


def test_adding_data_scales_like_the_concatenation(scheme: str, magnitudes: str) -> None:
    """Exactly the concatenation for the baseline; elsewhere the same N, loss and trace."""
    p = problem("cnn", n=60)
    parts = [Subset(p.dataset, rows) for rows in (range(22), range(22, 40), range(40, 60))]
    la = posterior(p, scheme, magnitudes, fit=False)
    for part in parts:
        la.fit(DataLoader(part, batch_size=5), override=False)
    whole = posterior(p, scheme, magnitudes, fit=False)
    whole.fit(DataLoader(ConcatDataset(parts), batch_size=7))
    assert la.n_data == whole.n_data == 60
    assert la.loss == pytest.approx(whole.loss, rel=1e-10)
    if (scheme, magnitudes) == ("single", "kfac"):
        for a, b in zip(everything(la, p.x), everything(whole, p.x), strict=True):
            assert_exact(a, b)
    if magnitudes == "ggn":
        assert float(oracles.table(la.H).sum()) == pytest.approx(
            float(oracles.table(whole.H).sum()), rel=1e-9
        )


def test_adding_draws_keeps_n_and_never_repeats_one(scheme: str, magnitudes: str) -> None:
    p = problem("mlp", n=40)
    la = posterior(p, scheme, magnitudes, fit=False, sampling="uniform")
    la.fit(p.loader(), n_samples=20)
    la.fit(p.loader(), n_samples=20, override=False, seed=5)
    assert la.n_data == 40
    assert la.fitted.drawn == frozenset(range(40))
    full = posterior(p, "single", "ggn")
    assert la.loss == pytest.approx(full.loss, rel=1e-10)
    with pytest.raises(ValueError, match="exceeds the 0 samples"):
        la.fit(p.loader(), n_samples=2, override=False)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_state_survives_a_file_to_the_bit(scheme: str, magnitudes: str, likelihood: str) -> None:
    p = problem("cnn", likelihood)
    extra = {"sigma_noise": 0.4} if likelihood == "regression" else {}
    la = posterior(p, scheme, magnitudes, temperature=1.5, **extra)
    la.prior_precision = torch.linspace(0.5, 2.0, la.n_layers, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(la.state_dict(), file)
    file.seek(0)
    other = posterior(p, scheme, magnitudes, fit=False)
    other.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(everything(other, p.x), everything(la, p.x), strict=True):
        assert torch.equal(a, b)
    assert other.coverage == la.coverage
    # An earlier state is a value: adding data to a fit does not reach it.
    state = la.state_dict()
    expected = everything(other, p.x)
    la.fit(p.loader(), override=False)
    other.load_state_dict(state)
    for a, b in zip(everything(other, p.x), expected, strict=True):
        assert torch.equal(a, b)
    other.fit(p.loader(), override=False)
    for a, b in zip(everything(other, p.x), everything(la, p.x), strict=True):
        assert torch.equal(a, b)


def test_state_of_something_else_is_refused(scheme: str, magnitudes: str) -> None:
    p = problem("mlp")
    la = posterior(p, scheme, magnitudes)
    state, before = la.state_dict(), everything(la, p.x)
    wrong = [
        {**state, "cls_name": "KronLaplace"},
        {**state, "likelihood": "regression"},
        {**state, "covered[0]": "somewhere.weight"},
        {**state, "mean": state["mean"][:-1]},
        {**state, "version": 99},
        {key: value for key, value in state.items() if not key.startswith("covered")},
        {k: v[:1] if k.startswith("tables") else v for k, v in state.items()},
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match=r"state|parameter"):
            la.load_state_dict(bad)
    for a, b in zip(everything(la, p.x), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layerwise", [False, True])
def test_marginal_likelihood_gradients_equal_finite_differences(
    scheme: str, magnitudes: str, layerwise: bool
) -> None:
    la = posterior(problem("mlp", "regression"), scheme, magnitudes)
    prior = torch.linspace(0.5, 2.0, la.n_layers if layerwise else 1, dtype=torch.float64)
    sigma = torch.tensor(0.7, dtype=torch.float64)

    def value(delta: Tensor, noise: Tensor) -> Tensor:
        return la.log_marginal_likelihood(prior_precision=delta, sigma_noise=noise)

    leaves = prior.clone().requires_grad_(), sigma.clone().requires_grad_()
    gradients = torch.autograd.grad(value(*leaves), leaves)
    step = 1e-5
    differences = [
        (value(prior + e, sigma) - value(prior - e, sigma)) / (2 * step)
        for e in step * torch.eye(len(prior), dtype=torch.float64)
    ]
    by_noise = (value(prior, sigma + step) - value(prior, sigma - step)) / (2 * step)
    assert relative_error(gradients[0], torch.stack(differences).detach()) <= FINITE_DIFFERENCE
    assert relative_error(gradients[1], by_noise) <= FINITE_DIFFERENCE


def test_loader_types_agree(scheme: str, magnitudes: str) -> None:
    """A list of batches and a stream split by position; both stand for the same data."""
    p = problem("mlp")
    lists = list(p.loader())
    la, again = (posterior(p, scheme, magnitudes, fit=False) for _ in range(2))
    la.fit(lists, n_data=26)
    again.fit(lists, n_data=26, seed=3)
    assert_exact(la.H.to_matrix(), again.H.to_matrix())
    assert la.loss == pytest.approx(posterior(p, scheme, magnitudes).loss, rel=1e-12)


def test_seed_decides_and_global_generators_do_not(scheme: str, magnitudes: str) -> None:
    p = problem("mlp", n=60)

    def fit(seed: int) -> Tensor:
        torch.rand(3)
        la = posterior(p, scheme, magnitudes, fit=False)
        la.fit(DataLoader(p.dataset, batch_size=9, shuffle=True), n_samples=20, seed=seed)
        return la.H.to_matrix()

    assert torch.equal(fit(0), fit(0))
    assert not torch.allclose(fit(0), fit(1))


def test_bias_report_compares_batches_or_says_that_there_is_one(
    scheme: str, magnitudes: str
) -> None:
    la = posterior(problem("mlp"), scheme, magnitudes)
    if scheme == "single":
        with pytest.raises(ValueError, match="one batch only"):
            la.bias_report()
        return
    report = la.bias_report()
    assert report.decile_ratios[0] > 1.0
    assert "curvature" in str(report)


def test_model_without_layers_of_its_own_names(scheme: str, magnitudes: str) -> None:
    """A bare layer: its module's name is empty."""
    p = problem("mlp")
    bare = Problem(nn.Linear(4, 3).double(), p.x, p.y, p.likelihood)
    la = posterior(bare, scheme, magnitudes)
    assert la.coverage.covered == ("weight", "bias")
    if scheme == "single" and magnitudes == "ggn":
        expected = 26 * oracles.directional(la.H, oracles.ggn(bare, ["weight", "bias"]))
        assert_exact(oracles.table(la.H), expected)
