"""The Kronecker posterior of every likelihood against dense curvature and dense predictions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from laplace_debiased.errors import NumericalError
from laplace_debiased.factory import DebiasedLaplace
from tests import oracles
from tests.likelihoods.problems import IGNORED, NAMES, Case, Reward, case
from tests.moments import moments
from tests.tolerances import SIGMAS, assert_exact, assert_same, deviation

PROBABILITIES = [name for name in NAMES if name not in ("outputs", "rewards", "stacked rewards")]


def inverse_link(c: Case, f: Tensor) -> Tensor:
    return torch.sigmoid(f) if c.likelihood == "bernoulli" else torch.softmax(f, -1)


def variances(c: Case, la: object, x: Tensor, f: Tensor) -> Tensor:
    return c.covariance(la, x).diagonal(dim1=1, dim2=2).reshape(f.shape)


@pytest.mark.parametrize("fisher", ["type2", "empirical"])
@pytest.mark.parametrize("name", NAMES)
def test_directional_curvature_and_loss_are_the_dense_ones(name: str, fisher: str) -> None:
    c = case(name)
    la = c.posterior(scheme="single", fisher=fisher)
    la.fit(c.loader())
    assert_exact(oracles.table(la.H), oracles.directional(la.H, c.ggn(fisher)))
    assert la.loss == pytest.approx(float(c.losses().sum()), rel=1e-10)
    assert la.n_data == len(c.x)


@pytest.mark.parametrize("name", ["multi-label", "sequence ignoring", "rewards"])
def test_cross_fitted_magnitudes_keep_the_dense_trace(name: str) -> None:
    c = case(name, n=12)
    la = c.posterior()
    la.fit(c.loader())
    assert float(oracles.table(la.H).sum()) == pytest.approx(float(c.ggn().trace()), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_monte_carlo_draws_are_unbiased_for_the_trace(name: str) -> None:
    """Seeds 0..39, four draws per label, 3 σ: error rate 0.3 % per likelihood."""
    c = case(name)
    la = c.posterior(scheme="single", fisher="mc", mc_samples=4)
    traces = []
    for seed in range(40):
        la.fit(c.loader(batch_size=13), seed=seed)
        traces.append(float(oracles.table(la.H).sum()))
    sampled = torch.tensor(traces, dtype=torch.float64)
    assert float(sampled.std()) > 0
    assert float(deviation(sampled, float(c.ggn().trace()))) <= SIGMAS


@pytest.mark.parametrize("name", ["multi-label", "sequence"])
def test_both_batches_have_label_draws_of_their_own(name: str) -> None:
    c = case(name)
    la = c.posterior(fisher="mc")
    loader = c.loader()
    with pytest.warns(UserWarning, match="share 13 samples"):
        la.fit(loader, magnitude_loader=loader)
    one, other = la.fitted.curvature.folds
    assert not torch.allclose(one.blocks[0].output, other.blocks[0].output, rtol=1e-3)
    assert_exact(one.blocks[0].input, other.blocks[0].input)


@pytest.mark.parametrize("name", NAMES)
def test_batches_and_chunks_change_nothing(name: str) -> None:
    c = case(name)
    la, other = c.posterior(scheme="single"), c.posterior(scheme="single", byte_budget=1)
    la.fit(c.loader())
    other.fit(c.loader(batch_size=4))
    assert_same(other.H.to_matrix(), la.H.to_matrix())
    assert_same(moments(other, c.x, _kind())[1], moments(la, c.x, _kind())[1])


def _kind() -> object:
    from laplace_debiased.predictive import OutputCovariance

    return OutputCovariance.PER_SAMPLE


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_are_those_of_the_dense_posterior(name: str) -> None:
    c = case(name)
    la = c.posterior(prior_precision=0.4, temperature=1.3)
    la.fit(c.loader())
    x = c.x[:4]
    f = c.outputs(x)
    scaled = f / (1 + math.pi / 8 * variances(c, la, x, f)).sqrt()
    probs = la(x, link_approx="probit")
    assert probs.shape == f.shape
    assert_exact(probs, inverse_link(c, scaled))


@pytest.mark.parametrize("name", ["multi-label", "sequence"])
@pytest.mark.parametrize("pred_type", ["glm", "nn"])
def test_sampled_probabilities_agree_with_samples_from_the_dense_posterior(
    name: str, pred_type: str
) -> None:
    """Seed 0, 3 000 draws. At a tight prior network and linearisation agree to 1e-3; 4 σ."""
    c = case(name)
    la = c.posterior(prior_precision=300.0)
    la.fit(c.loader())
    x, n = c.x[:2], 3000
    f, covariance = c.outputs(x).flatten(1), c.covariance(la, x)
    noise = torch.randn(n, *f.shape, generator=torch.Generator().manual_seed(9)).double()
    draws = f + torch.einsum("mij,smj->smi", torch.linalg.cholesky(covariance), noise)
    dense = inverse_link(c, draws.reshape(n, *c.outputs(x).shape))
    g = torch.Generator().manual_seed(0)
    probs = la(x, pred_type=pred_type, link_approx="mc", n_samples=n, generator=g)
    assert float(((probs - dense.mean(0)).abs() - 1e-3).max()) <= 4 * float(
        (dense.std(0) * (2 / n) ** 0.5).max()
    )
    samples = la.predictive_samples(x, pred_type=pred_type, n_samples=5, generator=g)
    assert samples.shape == (5, *c.outputs(x).shape)
    assert bool(((samples >= 0) & (samples <= 1)).all())


def test_the_bridges_are_for_classes_that_exclude_each_other() -> None:
    c = case("multi-label")
    la = c.posterior()
    la.fit(c.loader())
    for use in (
        lambda: la(c.x, link_approx="bridge"),
        lambda: la.optimize_prior_precision(val_loader=c.loader(), link_approx="bridge"),
    ):
        with pytest.raises(ValueError, match="'probit' or 'mc'"):
            use()
    s = case("sequence")
    la = s.posterior()
    la.fit(s.loader())
    probs = la(s.x, link_approx="bridge")
    assert_exact(probs.sum(-1), torch.ones(13, 3).double())


@pytest.mark.parametrize("name", PROBABILITIES)
def test_grid_search_scores_the_labels_that_count(name: str) -> None:
    c = case(name)
    la = c.posterior()
    la.fit(c.loader())
    la.optimize_prior_precision(
        val_loader=c.loader(batch_size=4),
        grid_size=3,
        log_prior_prec_min=-1,
        log_prior_prec_max=1,
        refine=False,
    )
    for prior, loss in zip((0.1, 1.0, 10.0), la.tuning_result.losses, strict=True):
        la.prior_precision = prior
        p = la(c.x)
        if c.likelihood == "bernoulli":
            y = c.y.reshape(p.shape).to(p)
            expected = -(y * p.log() + (1 - y) * (1 - p).log()).sum(-1).mean()
        else:
            counted = c.y != IGNORED
            labels = c.y.masked_fill(~counted, 0)
            picked = p.gather(-1, labels.unsqueeze(-1)).squeeze(-1).log()
            expected = -picked[counted].mean()
        assert loss == pytest.approx(float(expected), rel=1e-8)


def test_sampled_networks_are_tuned_on_labels_that_count() -> None:
    c = case("sequence ignoring")
    la = c.posterior()
    la.fit(c.loader())
    la.optimize_prior_precision(
        "nn", val_loader=c.loader(), grid_size=2, log_prior_prec_min=1, n_samples=3
    )
    assert all(map(math.isfinite, la.tuning_result.losses))


def test_a_label_that_does_not_count_adds_no_curvature() -> None:
    """Dropping the samples gives the same trace; the eigenbases of the inputs differ."""
    c = case("ignoring")
    counted = c.y != IGNORED
    la, part = c.posterior(scheme="single"), c.posterior(scheme="single")
    la.fit(c.loader())
    part.fit(
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(c.x[counted], c.y[counted]), batch_size=5
        )
    )
    total = float(oracles.table(part.H).sum())
    assert float(oracles.table(la.H).sum()) == pytest.approx(total, rel=1e-10)


def test_binary_labels_equal_two_classes_with_logits_zero_and_f() -> None:
    c = case("binary")

    class TwoLogits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = c.model

        def forward(self, x: Tensor) -> Tensor:
            f = self.net(x)
            return torch.cat([torch.zeros_like(f), f], -1)

    la = c.posterior(scheme="single")
    la.fit(c.loader())
    labels = c.y.long().squeeze(1)
    two = DebiasedLaplace(TwoLogits(), scheme="single")
    two.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(c.x, labels), batch_size=5))
    assert_exact(two.H.to_matrix(), la.H.to_matrix())
    assert_exact(two.log_marginal_likelihood(), la.log_marginal_likelihood())


def test_rewards_are_predicted_with_the_covariance_of_the_dense_posterior() -> None:
    c = case("rewards")
    la = c.posterior()
    la.fit(c.loader())
    x = c.x[:4, 0]
    mean, covariance = la(x)
    assert_exact(mean, c.outputs(x))
    assert_exact(covariance, c.covariance(la, x))
    flat, joint = la(x, joint=True)
    assert_exact(joint.diagonal().reshape(-1, 1, 1), covariance)
    assert_exact(flat, mean.flatten())
    pair = c.x[:4]
    f = c.outputs(pair)
    scaled = f / (1 + math.pi / 8 * variances(c, la, pair, f)).sqrt()
    probit = la(pair, fitting=True, link_approx="probit")
    assert_exact(probit, torch.softmax(scaled, -1))
    assert [t.shape for t in la(x, pred_type="nn", link_approx="mc", n_samples=4)] == [(4, 1)] * 2
    la.optimize_prior_precision(val_loader=c.loader(), grid_size=5)
    la.optimize_prior_precision("nn", val_loader=c.loader(), grid_size=2, n_samples=3)
    assert torch.isfinite(la.log_marginal_likelihood())


class FlatReward(Reward):
    """Pairs as laplace-torch's example has them: one row per reward, then folded back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(-1, 4)).reshape(len(x), -1)


@pytest.mark.parametrize("frozen", [(), ("inner.weight", "inner.bias")])
@pytest.mark.parametrize("structure", ["kron", "lowrank"])
def test_rewards_of_flattened_pairs_are_those_of_pairs(
    structure: str, frozen: tuple[str, ...]
) -> None:
    c, flat = case("rewards"), FlatReward().double()
    flat.load_state_dict(c.model.state_dict())
    x, found = c.x[:4], []
    for model in (c.model, flat):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        la = DebiasedLaplace(model, "reward_modeling", hessian_structure=structure, strict=True)
        la.fit(c.loader())
        found.append((*la(x[:, 0]), la(x, fitting=True), la.log_marginal_likelihood()))
    for own, other in zip(*found, strict=True):
        assert_exact(own, other)
    assert float(found[0][1].min()) > 0


def test_rewards_are_fitted_on_pairs() -> None:
    c = case("rewards")
    single = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(c.x[:, 0], c.y), batch_size=5
    )
    with pytest.raises(ValueError, match="fitted on pairs"):
        c.posterior().fit(single)


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_sigma_follows_the_residuals(subset: str, structure: str) -> None:
    c = case("outputs")
    la = DebiasedLaplace(c.model, "regression", subset, structure, sigma_noise="residual")
    assert float(la.sigma_noise) == 1.0
    la.fit(c.loader())
    expected = float((c.outputs() - c.y).square().mean().sqrt())
    assert float(la.sigma_noise) == pytest.approx(expected, rel=1e-6)
    la.sigma_noise = 0.3
    la.fit(c.loader())
    assert float(la.sigma_noise) == pytest.approx(expected, rel=1e-6)
    state = la.state_dict()
    other = DebiasedLaplace(c.model, "regression", subset, structure, sigma_noise="residual")
    other.load_state_dict(state)
    assert torch.equal(other.sigma_noise, la.sigma_noise)


def test_residual_sigma_maximises_the_likelihood_of_the_training_data() -> None:
    c = case("outputs")
    la = c.posterior(sigma_noise="residual")
    la.fit(c.loader())
    best = float(la.log_likelihood)
    for factor in (0.99, 1.01):
        la.sigma_noise = float(la.sigma_noise) * factor
        assert float(la.log_likelihood) < best


def test_residuals_that_are_all_zero_are_refused_and_the_posterior_stays() -> None:
    c = case("outputs")
    la = c.posterior(sigma_noise="residual")
    la.fit(c.loader())
    before, sigma = la.H, la.sigma_noise.clone()
    exact = Case(c.model, c.x, c.outputs(), "regression", {})
    with pytest.raises(ValueError, match="not all zero"):
        la.fit(exact.loader(batch_size=13))
    assert la.H is before
    assert torch.equal(la.sigma_noise, sigma)


def test_a_fit_without_a_label_that_counts_is_refused() -> None:
    c = case("sequence ignoring")
    none = Case(c.model, c.x, torch.full_like(c.y, IGNORED), c.likelihood, c.options)
    for options in ({}, {"sampling": "uniform"}):
        with pytest.raises(ValueError, match="has a label that counts"):
            c.posterior(**options).fit(none.loader())


@pytest.mark.parametrize(("subset", "structure"), [("all", "lowrank")])
def test_sequences_need_a_kronecker_posterior(subset: str, structure: str) -> None:
    c = case("sequence")
    la = DebiasedLaplace(c.model, "classification", subset, structure)
    with pytest.raises(ValueError, match=r"\(batch, outputs\)"):
        la.fit(c.loader())


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("name", ["multi-label", "ignoring"])
def test_every_posterior_takes_binary_and_ignored_labels(
    name: str, subset: str, structure: str
) -> None:
    c = case(name)
    la = DebiasedLaplace(c.model, c.likelihood, subset, structure, **c.options)
    la.fit(c.loader())
    p = la(c.x)
    assert p.shape == (13, 3)
    assert bool(((p > 0) & (p < 1)).all())
    assert la.loss == pytest.approx(float(c.losses().sum()), rel=1e-10)
    state = la.state_dict()
    assert state["likelihood"] == c.likelihood
    other = DebiasedLaplace(c.model, c.likelihood, subset, structure, **c.options)
    other.load_state_dict(state)
    assert_same(other(c.x), p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_at_extreme_logits_stays_finite(dtype: torch.dtype) -> None:
    c = case("binary")
    with torch.no_grad():
        c.model[2].weight.mul_(1e4)
    model = c.model.to(dtype)
    la = DebiasedLaplace(model, "bernoulli")
    try:
        la.fit(Case(model, c.x.to(dtype), c.y, "bernoulli", {}).loader())
    except NumericalError:
        pytest.fail("saturated logits have curvature zero, not NaN")
    assert torch.isfinite(la(c.x.to(dtype))).all()


def test_weighted_draws_of_sequences_weigh_their_columns_and_magnitudes_alike() -> None:
    """With a T = m that a wrong broadcast would not notice."""
    c = case("sequence")
    la = c.posterior(scheme="single", sampling="curvature")
    la.fit(c.loader(batch_size=3), n_samples=6)
    factor = la.fitted.curvature.folds[0].blocks[-1]
    assert factor.name == "head.bias"
    table = la.H.blocks[-1].eigenvalues
    assert float(factor.output.trace()) * 13 == pytest.approx(float(table.sum()), rel=1e-10)
