"""`evaluate` on laplace-torch's own posteriors, and what it leaves behind."""

import random

import numpy as np
import pytest
import torch
from laplace import Laplace
from torch import nn

from laplace_debiased.calibration import collect_logits, evaluate, fit_temperature
from tests.calibration.helpers import FakePosterior, loader_of


def _model(n_out):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, n_out))


def _data(likelihood, n=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator)
    if likelihood == "regression":
        return x, torch.randn(n, 2, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def _fitted(likelihood, subset="all", **kwargs):
    x, y = _data(likelihood)
    la = Laplace(
        _model(2 if likelihood == "regression" else 3),
        likelihood,
        subset_of_weights=subset,
        hessian_structure="kron",
        **kwargs,
    )
    la.fit(loader_of(x, y))
    return la, x, y


@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_classification_posterior_scores_its_own_probabilities(subset):
    la, x, y = _fitted("classification", subset)
    record = evaluate(la, loader_of(x, y, batch_size=7), ood_loader=loader_of(3 * x))
    probs = la(x).detach()
    assert record.nll == pytest.approx(-probs[range(24), y].log().mean().item(), rel=1e-5)
    assert record.accuracy == pytest.approx((probs.argmax(1) == y).float().mean().item())
    assert 0.0 <= record.auroc <= 1.0


def test_regression_posterior_is_scored_with_its_noise():
    la, x, y = _fitted("regression", sigma_noise=0.7)
    record = evaluate(la, loader_of(x, y, batch_size=7))
    mean, covariance = (part.detach() for part in la(x))
    density = torch.distributions.MultivariateNormal(mean, covariance + 0.49 * torch.eye(2))
    assert record.nll == pytest.approx(-density.log_prob(y).mean().item(), rel=1e-5)
    epistemic = covariance.diagonal(dim1=1, dim2=2)
    assert record.epistemic_std == pytest.approx(epistemic.sqrt().mean().item(), rel=1e-5)
    assert record.total_std == pytest.approx((epistemic + 0.49).sqrt().mean().item(), rel=1e-5)


@pytest.mark.parametrize("asked", [{"link_approx": "mc"}, {"pred_type": "nn"}])
def test_sampled_predictive_repeats_and_draws_nothing_from_the_user(asked):
    la, x, y = _fitted("classification")
    torch.manual_seed(3)
    first = evaluate(la, loader_of(x, y), **asked)
    assert evaluate(la, loader_of(x, y), **asked) == first
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert first != evaluate(la, loader_of(x, y))


class _FailsAndDraws(FakePosterior):
    def __call__(self, x, **kwargs):
        assert not self.model.training
        assert torch.is_grad_enabled()
        torch.rand(2), np.random.rand(2), random.random()
        for parameter in self.model.parameters():
            parameter.data = torch.zeros_like(parameter)
            parameter.grad = None
        if self.sigma_noise == "fail":
            raise RuntimeError("from inside")
        return super().__call__(x)


@pytest.mark.parametrize("fails", [True, False])
def test_model_and_generators_are_left_as_they_were(fails):
    la = _FailsAndDraws(model=_model(3), sigma_noise="fail" if fails else 1.0)
    la.model.train()
    la.model[2].eval()
    for parameter in la.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights = [parameter.clone() for parameter in la.model.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    loader = loader_of(torch.full((4, 2), 0.5), torch.zeros(4, dtype=int), shuffle=True)
    if fails:
        with pytest.raises(RuntimeError, match="from inside"):
            evaluate(la, loader)
    else:
        with torch.no_grad():
            evaluate(la, loader, ood_loader=loader)
    assert [module.training for module in la.model] == [True, True, False, True]
    assert la.model.training
    for parameter, weight in zip(la.model.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_labels_alone_draw_nothing_from_the_user():
    loader = loader_of(torch.zeros(4, 1), torch.zeros(4, dtype=int))
    state = torch.get_rng_state()
    evaluate(np.full((4, 2), 0.5), loader)
    logits = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    fit_temperature(logits, loader_of(logits, torch.tensor([0, 0, 1, 1])))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_grad_mode_does_not_matter(mode):
    la, x, y = _fitted("classification")
    expected = evaluate(la, loader_of(x, y))
    with mode():
        assert evaluate(la, loader_of(x, y)) == expected


def test_logits_are_collected_in_eval_mode_in_order():
    model, (x, y) = _model(3).train(), _data("classification")
    logits, labels = collect_logits(model, loader_of(x, y, batch_size=5))
    assert model.training
    assert torch.equal(labels, y)
    torch.testing.assert_close(logits, model.eval()(x).detach())
    assert not logits.requires_grad
