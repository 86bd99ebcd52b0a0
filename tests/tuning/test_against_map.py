"""Tuning knows the MAP model's likelihood, and says where the posterior's is worse."""

import math
import warnings

import pytest
import torch
from torch import nn

from laplace_debiased import DebiasedLaplace
from laplace_debiased.tuning import TuningResult
from tests.likelihoods.problems import NAMES, case
from tests.untouched import untouched
from tests.zoo import Problem, problem

GRID = {"log_prior_prec_min": -2, "log_prior_prec_max": 3, "grid_size": 4}
WORSE = "worse than the .* of the MAP model"


def quietly(la, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        la.optimize_prior_precision(**GRID | kwargs)
    return la.tuning_result


def map_nll(la, p):
    """The MAP model's negative log likelihood, by torch's own losses."""
    with torch.no_grad():
        f = la.model(p.x)
    if p.likelihood == "regression":
        variance = torch.full_like(f, float(la.sigma_noise) ** 2)
        loss = nn.GaussianNLLLoss(full=True, reduction="none")
        return float(loss(f, p.y, variance).sum(-1).mean())
    return float(nn.functional.cross_entropy(f, p.y))


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_loss_of_the_map_model_is_that_of_its_outputs(likelihood, structure, pred_type):
    p = problem("mlp", likelihood)
    noise = {"sigma_noise": 0.7} if likelihood == "regression" else {}
    la = DebiasedLaplace(p.model, likelihood, hessian_structure=structure, **noise)
    la.fit(p.loader(), n_samples=10)
    loader = p.loader(batch_size=7)
    with untouched(p.model, loader):
        result = quietly(la, val_loader=loader, pred_type=pred_type, n_samples=3)
    assert result.map_loss == pytest.approx(map_nll(la, p), rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_labels_that_count_alone_are_in_it(name):
    c = case(name)
    if c.likelihood == "reward_modeling":
        pytest.skip("predicts rewards")
    la = c.posterior()
    la.fit(c.loader())
    results = [quietly(la, val_loader=c.loader(), refine=False)]
    results += [quietly(la, val_loader=c.loader(), refine=False, pred_type="nn", n_samples=2)]
    # With a prior that leaves no variance, the posterior is the MAP model.
    certain = {"log_prior_prec_min": 14, "log_prior_prec_max": 15, "grid_size": 2}
    limit = quietly(la, val_loader=c.loader(), refine=False, **certain).losses[-1]
    for result in results:
        assert result.map_loss == pytest.approx(limit, rel=1e-6)


def underconfident():
    """A network whose logits are too small: any further variance makes it worse."""
    p = problem("mlp", n=60)
    with torch.no_grad():
        for parameter in p.model.parameters():
            parameter.mul_(2.0)
        y = p.model(p.x).argmax(-1)
        p.model[2].weight.mul_(0.5)
    return Problem(p.model, p.x, y, "classification")


def test_a_posterior_worse_than_the_map_model_is_told_once_with_figures():
    p = underconfident()
    la = DebiasedLaplace(p.model)
    la.fit(p.loader(), n_samples=10)
    with pytest.warns(UserWarning, match="the best prior precision") as caught:
        la.optimize_prior_precision(
            val_loader=p.loader(), log_prior_prec_min=-3, log_prior_prec_max=0, grid_size=4
        )
    texts = [str(w.message) for w in caught if "MAP model" in str(w.message)]
    result = la.tuning_result
    assert len(texts) == 1
    assert f"{result.loss:.4g}, worse than the {result.map_loss:.4g}" in texts[0]
    for remedy in ("fit_temperature", "more data"):
        assert remedy in texts[0]
    assert next(w for w in caught if "MAP model" in str(w.message)).filename == __file__
    assert result.map_loss == pytest.approx(map_nll(la, p), rel=1e-10)


def test_a_posterior_that_is_better_or_as_good_says_nothing():
    p = problem("mlp", n=60)  # random labels: doubt is right
    with torch.no_grad():
        p.model[2].weight.mul_(10.0)
    la = DebiasedLaplace(p.model)
    la.fit(p.loader())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", WORSE)
        la.optimize_prior_precision(val_loader=p.loader(), **GRID)
    assert la.tuning_result.loss < la.tuning_result.map_loss


@pytest.mark.parametrize("map_loss", [None, math.inf, math.nan, 1.001])
def test_nothing_to_compare_with_is_no_warning(map_loss):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TuningResult((1.0,), (1.0,), 1.0, 1.0, 1.0, map_loss).warn()


@pytest.mark.parametrize(("map_loss", "word"), [(1.0, "no better"), (0.999, "worse")])
def test_a_gain_that_means_nothing_is_none(map_loss, word):
    with pytest.warns(UserWarning, match=f"of 1, {word} than the {map_loss:.4g} of the MAP model"):
        TuningResult((1.0,), (1.0,), 1.0, 1.0, 1.0, map_loss).warn()


def test_a_loss_of_ones_own_is_not_compared():
    p = underconfident()
    la = DebiasedLaplace(p.model)
    la.fit(p.loader())
    result = quietly(la, val_loader=p.loader(), loss=lambda probs, y: 1 + probs.square().mean())
    assert result.map_loss is None


def test_the_record_goes_through_a_state_dict_with_and_without_the_map_loss():
    p = problem("mlp")
    la = DebiasedLaplace(p.model)
    la.fit(p.loader())
    quietly(la, val_loader=p.loader())
    state = la.state_dict()
    other = DebiasedLaplace(p.model)
    other.load_state_dict(state)
    assert other.tuning_result == la.tuning_result
    del state["tuning_result/map_loss"]  # as written before it was recorded
    other.load_state_dict(state)
    assert other.tuning_result.map_loss is None


def test_the_tuning_result_is_of_the_prior_in_use():
    p = problem("mlp")
    la = DebiasedLaplace(p.model)
    la.fit(p.loader())
    result = quietly(la, val_loader=p.loader(), link_approx="bridge")
    la.fit(p.loader(), n_samples=10)
    # A fit leaves the prior precision, and so what says where it comes from.
    assert float(la.prior_precision) == pytest.approx(result.prior_precision)
    assert la.tuning_result is result
    assert la.tuned_link_approx == "bridge"
    la.optimize_prior_precision(method="marglik", n_steps=2)
    assert la.tuning_result is None
    assert la.tuned_link_approx is None
