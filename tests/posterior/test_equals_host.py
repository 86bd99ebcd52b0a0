"""The baseline (single batch, factor magnitudes) is laplace-torch's KronLaplace."""

from __future__ import annotations

import copy

import pytest
import torch
from laplace.baselaplace import KronLaplace
from laplace.curvature.asdl import AsdlEF, AsdlGGN
from laplace.curvature.backpack import BackPackGGN
from laplace.curvature.curvlinops import CurvlinopsEF, CurvlinopsGGN
from torch import nn

from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.tolerances import assert_exact
from tests.zoo import Problem, cnn, problem

GGN = {"own": None, "curvlinops": CurvlinopsGGN, "asdl": AsdlGGN, "backpack": BackPackGGN}
CASES = [("mlp", "classification"), ("cnn", "classification"), ("mlp", "regression")]
HYPER = {"prior_precision": 0.7, "temperature": 1.3}


def pair(
    p: Problem, backend: type | None, host_backend: type = CurvlinopsGGN, **kwargs: object
) -> tuple[DebiasedKronLaplace, KronLaplace]:
    hyper = HYPER | ({"sigma_noise": 0.6} if p.likelihood == "regression" else {})
    ours = DebiasedKronLaplace(
        p.model,
        p.likelihood,
        scheme="single",
        magnitudes="kfac",
        sampling="uniform",
        backend=backend,
        **hyper,
        **kwargs,
    )
    host = KronLaplace(copy.deepcopy(p.model), p.likelihood, backend=host_backend, **hyper)
    ours.fit(p.loader(), n_samples=None)
    host.fit(p.loader())
    return ours, host


def assert_equal_posteriors(ours: DebiasedKronLaplace, host: KronLaplace, p: Problem) -> None:
    assert_exact(ours.mean, host.mean)
    assert_exact(ours.posterior_precision.to_matrix(), host.posterior_precision.to_matrix())
    assert_exact(ours.log_marginal_likelihood(), host.log_marginal_likelihood())
    assert ours.n_data == host.n_data
    x = p.x[:4]
    mean, covariance = ours._glm_predictive_distribution(x)
    host_mean, host_covariance = host._glm_predictive_distribution(x)
    assert_exact(mean, host_mean)
    assert_exact(covariance, host_covariance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", GGN)
@pytest.mark.parametrize(("kind", "likelihood"), CASES)
def test_baseline_is_kron_laplace(
    kind: str, likelihood: str, backend: str, dtype: torch.dtype
) -> None:
    if kind == "cnn" and backend == "backpack":
        pytest.skip("refused: see the next test")
    p = problem(kind, likelihood, dtype=dtype)
    if kind == "cnn":  # hooks of these backends and in-place activations exclude each other
        _make_out_of_place(p.model)
    ours, host = pair(p, GGN[backend])
    assert_equal_posteriors(ours, host, p)


def _make_out_of_place(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False


def test_backpack_with_a_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="wrong for convolutions"):
        DebiasedKronLaplace(cnn(), backend=BackPackGGN, magnitudes="kfac")


@pytest.mark.parametrize("backend", [None, CurvlinopsEF, AsdlEF])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_empirical_fisher_in_classification_is_the_backends(kind: str, backend) -> None:
    p = problem(kind)
    _make_out_of_place(p.model)
    kwargs = {"fisher": "empirical"} if backend is None else {}
    ours, host = pair(p, backend, backend or CurvlinopsEF, **kwargs)
    assert_equal_posteriors(ours, host, p)


@pytest.mark.parametrize("backend", [None, CurvlinopsEF, AsdlEF])
def test_empirical_fisher_in_regression_is_the_true_one(backend) -> None:
    """Backends report twice the true one; a bias block without positions is exact in K-FAC."""
    p = problem("mlp", "regression")
    kwargs = {"fisher": "empirical"} if backend is None else {}
    ours, _ = pair(p, backend, **kwargs)
    matrix, start = ours.H.to_matrix(), 0
    for name, parameter in p.model.named_parameters():
        block = slice(start, start := start + parameter.numel())
        if name.endswith("bias"):
            expected = len(p.x) * oracles.ggn(p, [name], fisher="empirical")
            assert_exact(matrix[block, block], expected)
    own, _ = pair(p, None, fisher="empirical")
    assert_exact(matrix, own.H.to_matrix())
    assert ours.loss == pytest.approx(own.loss, rel=1e-8)


@pytest.mark.parametrize("scheme", ["two_batch", "cross_fit"])
@pytest.mark.parametrize("backend", ["curvlinops", "asdl"])
def test_backends_give_the_same_debiased_posterior_as_our_own_pass(
    backend: str, scheme: str
) -> None:
    p = problem("cnn", n=40)
    _make_out_of_place(p.model)
    ours, theirs = (
        DebiasedKronLaplace(p.model, scheme=scheme, magnitudes="kfac", backend=b)
        for b in (None, GGN[backend])
    )
    for la in (ours, theirs):
        la.fit(p.loader(), n_samples=36, seed=3)
    assert_exact(theirs.H.to_matrix(), ours.H.to_matrix())
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-12)
    assert theirs.effective_sample_size == pytest.approx(ours.effective_sample_size, rel=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"backend": CurvlinopsGGN, "backend_kwargs": {"stochastic": True}, "magnitudes": "kfac"},
        {"fisher": "mc", "magnitudes": "kfac"},
        {"fisher": "mc", "magnitudes": "ggn"},
    ],
)
def test_batches_share_no_label_draws_and_seeds_decide_them(options: dict) -> None:
    """B and B̃ hold the same samples: only the labels that are drawn can tell them apart."""
    p = problem("mlp", n=12)

    def fit(seed: int) -> DebiasedKronLaplace:
        la = DebiasedKronLaplace(p.model, scheme="two_batch", **options)
        with pytest.warns(UserWarning, match="share"):
            la.fit(loader := p.loader(), magnitude_loader=loader, n_data=1, seed=seed)
        return la

    la = fit(0)
    one, two = la.fitted.curvature.folds
    for block, other in zip(one.blocks, two.blocks, strict=True):
        assert not torch.allclose(block.output, other.output, rtol=1e-3)
    assert torch.equal(fit(0).H.to_matrix(), la.H.to_matrix())
    assert not torch.allclose(fit(1).H.to_matrix(), la.H.to_matrix(), rtol=1e-3)


def test_conflicting_fisher_is_refused() -> None:
    model = problem("mlp").model
    with pytest.raises(ValueError, match="fisher='type2', but fisher='empirical'"):
        DebiasedKronLaplace(model, backend=AsdlGGN, fisher="empirical", magnitudes="kfac")
    with pytest.raises(TypeError, match="CurvatureInterface"):
        DebiasedKronLaplace(model, backend=nn.Linear)
    with pytest.raises(ValueError, match="need a backend"):
        DebiasedKronLaplace(model, backend_kwargs={"stochastic": True})
