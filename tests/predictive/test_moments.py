"""Output covariances against the dense posterior, whatever the chunks, and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased.posterior import DebiasedKronLaplace
from laplace_debiased.tuning.moments import covariance_curve
from tests import oracles
from tests.moments import sweep as sweep_of
from tests.tolerances import (
    FINITE_DIFFERENCE,
    INTERPOLATED,
    assert_exact,
    assert_same,
    relative_error,
)
from tests.zoo import KINDS, Problem, problem

BUDGETS = [1, 2**30]


def fitted(p: Problem, **options: object) -> DebiasedKronLaplace:
    la = DebiasedKronLaplace(p.model, p.likelihood, **options)
    la.fit(p.loader(), seed=1)
    return la


def dense_covariance(la: DebiasedKronLaplace, x: Tensor) -> Tensor:
    """J P⁻¹ Jᵀ over all samples and outputs [m·C, m·C]."""
    jac = oracles.jacobian(la.model, x, la.coverage.covered).flatten(0, 1)
    sigma = float(la.sigma_noise)
    precision = oracles.dense_precision(
        la.H, la.prior_precision.double(), 1 / (sigma**2 * la.temperature)
    )
    return jac @ torch.linalg.solve(precision, jac.T)


def per_sample(joint: Tensor, m: int) -> Tensor:
    n_outputs = len(joint) // m
    blocks = joint.reshape(m, n_outputs, m, n_outputs)
    return torch.stack([blocks[n, :, n] for n in range(m)])


@pytest.mark.parametrize("byte_budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_covariances_are_the_dense_posteriors(kind: str, byte_budget: int) -> None:
    p = problem(kind, "regression")
    la = fitted(p, byte_budget=byte_budget, sigma_noise=0.6, temperature=1.7, prior_precision=0.4)
    x = p.x[:5]
    joint = dense_covariance(la, x)
    mean, covariance = la(x)
    assert_exact(mean, p.model.eval()(x.clone()))
    assert_exact(covariance, per_sample(joint, 5))
    assert_exact(la(x, diagonal_output=True)[1], per_sample(joint, 5).diagonal(dim1=1, dim2=2))
    flat, actual = la(x, joint=True)
    assert_exact(flat, mean.flatten())
    assert_exact(actual, joint)


def test_float32_covariances_are_the_dense_posteriors() -> None:
    p = problem("cnn", "regression", dtype=torch.float32)
    la = fitted(p)
    jac = oracles.jacobian(p.model, p.x[:4], la.coverage.covered)
    assert_exact(la(p.x[:4])[1], la.posterior_precision.inv_square_form(jac))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_layerwise_priors_reach_their_blocks(kind: str) -> None:
    p = problem(kind, "regression")
    la = fitted(p)
    la.prior_precision = torch.linspace(0.5, 3.0, la.n_layers, dtype=torch.float64)
    joint = dense_covariance(la, p.x[:4])
    assert_exact(la(p.x[:4], joint=True)[1], joint)
    assert_exact(la(p.x[:4])[1], per_sample(joint, 4))


@pytest.mark.parametrize("byte_budget", BUDGETS)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "positions"])
def test_prior_sweep_is_one_covariance_per_prior(
    kind: str, diagonal: bool, byte_budget: int
) -> None:
    p = problem(kind, "regression")
    la = fitted(p, byte_budget=byte_budget, sigma_noise=0.6, temperature=1.7)
    priors = torch.tensor([1e-3, 0.5, 40.0], dtype=torch.float64)
    mean, sweep = sweep_of(la, p.x[:5], priors, diagonal)
    assert_exact(mean, p.model.eval()(p.x[:5].clone()))
    for prior, actual in zip(priors, sweep, strict=True):
        la.prior_precision = prior
        assert_exact(actual, la(p.x[:5], diagonal_output=diagonal)[1])


@pytest.mark.parametrize("diagonal", [False, True])
def test_interpolated_covariances_are_those_of_the_prior_between(diagonal: bool) -> None:
    p = problem("cnn")
    la = fitted(p)
    nodes = torch.linspace(-4, 4, 20, dtype=torch.float64)
    sweep = sweep_of(la, p.x, nodes.exp(), diagonal)[1]
    curve = covariance_curve(nodes, sweep, -0.5, 0.5, diagonal=diagonal)
    for log_prior in (-0.4, 0.1, 0.33):
        point = torch.tensor([log_prior], dtype=torch.float64).exp()
        expected = sweep_of(la, p.x, point, diagonal)[1][0]
        assert relative_error(curve(log_prior), expected) <= INTERPOLATED


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("byte_budget", BUDGETS)
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_gradients_in_the_inputs_equal_finite_differences(
    kind: str, byte_budget: int, joint: bool
) -> None:
    p = problem(kind, "regression", n=8)
    la = fitted(p, enable_backprop=True, byte_budget=byte_budget)
    x = p.x[:2].clone().requires_grad_()
    g = torch.Generator().manual_seed(0)

    def value(inputs: Tensor) -> Tensor:
        mean, covariance = la(inputs, joint=joint)
        return (mean * mix_mean).sum() + (covariance * mix_covariance).sum()

    with torch.no_grad():
        shapes = [t.shape for t in la(x.detach(), joint=joint)]
    mix_mean, mix_covariance = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    (actual,) = torch.autograd.grad(value(x), x)
    direction = torch.randn(x.shape, generator=g, dtype=torch.float64)
    step = 1e-5 * direction
    with torch.no_grad():
        expected = (value(x + step) - value(x - step)) / 2e-5
    assert relative_error((actual * direction).sum(), expected) <= 10 * FINITE_DIFFERENCE


def test_without_backprop_predictions_carry_no_graph() -> None:
    p = problem("mlp")
    la = fitted(p)
    assert not la(p.x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_fit_and_predictions_work_in_any_grad_mode(context) -> None:
    p = problem("cnn")
    expected = fitted(p)(p.x, link_approx="probit")
    with context():
        la = fitted(p)
        actual = la(p.x, link_approx="probit")
        la(p.x, link_approx="bridge")
        la.optimize_prior_precision(n_steps=2)
        la.log_marginal_likelihood()
        la.optimize_prior_precision(val_loader=p.loader())
        la.prior_precision = 1.0
        state = la.state_dict()
    la.load_state_dict(state)
    assert_same(la(p.x, link_approx="probit"), expected)
    assert_same(actual.clone(), expected)


def test_inputs_made_in_inference_mode_are_accepted() -> None:
    p = problem("cnn")
    la = fitted(p)
    with torch.inference_mode():
        x = p.x * 1.0
    assert_same(la(x), la(p.x))


@pytest.mark.parametrize("order", [[3, 1, 0, 2, 4]])
def test_permuting_the_inputs_permutes_the_predictions(order: list[int]) -> None:
    p = problem("cnn")
    la = fitted(p)
    assert_same(la(p.x[order]), la(p.x[:5])[order])
    assert_same(la(p.x[:1]), la(p.x)[:1])


def test_sampled_networks_honour_the_generator_and_never_write_weights(untouched) -> None:
    p = problem("cnn")
    la = fitted(p)

    def draw(seed: int) -> Tensor:
        with untouched(p.model):
            generator = torch.Generator().manual_seed(seed)
            return la(p.x, pred_type="nn", n_samples=4, generator=generator)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_sampled_networks_are_the_network_at_the_samples() -> None:
    p = problem("mlp")
    la = fitted(p)
    weights = la.sample(3, torch.Generator().manual_seed(0))
    outputs = la.functional_samples(p.x, "nn", 3, generator=torch.Generator().manual_seed(0))
    for vector, actual in zip(weights, outputs, strict=True):
        sizes = [q.numel() for q in p.model.parameters()]
        values = {
            name: part.reshape(q.shape)
            for (name, q), part in zip(p.model.named_parameters(), vector.split(sizes), strict=True)
        }
        assert_exact(actual, torch.func.functional_call(p.model, values, (p.x,)))


def test_sampled_networks_restore_the_model_when_it_raises(untouched) -> None:
    p = problem("mlp")
    la = fitted(p)
    with untouched(p.model), pytest.raises(RuntimeError, match="shapes"):
        la(torch.zeros(2, 7).double(), pred_type="nn", generator=torch.Generator())


def test_linear_model_sampled_and_linearised_agree() -> None:
    """The GLM of a linear model is the model: seed 0, 4 000 draws, tolerance 10 %."""
    p = problem("mlp", "regression")
    model = nn.Linear(4, 2).double()
    p = Problem(model, p.x, p.y[:, :2], "regression")
    la = fitted(p)
    mean, variance = la(p.x, pred_type="nn", n_samples=4000, generator=torch.Generator())
    glm_mean, glm_variance = la(p.x, diagonal_output=True)
    assert relative_error(mean, glm_mean) < 0.1
    assert relative_error(variance, glm_variance) < 0.1


def test_dict_inputs_predict_as_tensors_do() -> None:
    class Keyed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.inner(batch["input_ids"])

    p = problem("mlp")
    keyed = Keyed(p.model)
    batches = [{"input_ids": x, "labels": y} for x, y in p.loader()]
    la, expected = (DebiasedKronLaplace(m, scheme="single") for m in (keyed, p.model))
    la.fit(batches, n_data=len(p.x))
    expected.fit(p.loader())
    batch = {"input_ids": p.x, "labels": p.y}
    assert_same(la(batch), expected(p.x))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one = la(batch, pred_type="nn", n_samples=2, generator=generators[0])
    assert_same(one, expected(p.x, pred_type="nn", n_samples=2, generator=generators[1]))
