"""Function draws: one function each, of the posterior's moments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.predictive.draws import NetworkProducts, twice_backward
from tests import oracles
from tests.likelihoods.problems import case
from tests.tolerances import FINITE_DIFFERENCE, assert_exact, assert_same, relative_error
from tests.zoo import problem

POSTERIORS = [
    ("all", "kron", {}),
    ("all", "kron", {"max_rank": 2}),
    ("last_layer", "kron", {}),
    ("all", "lowrank", {"rank": 5}),
    ("last_layer", "lowrank", {"rank": 4}),
]


def fitted(subset: str, structure: str, options: dict, kind: str = "cnn", **more: object):
    p = problem(kind)
    la = DebiasedLaplace(
        p.model, "classification", subset, structure, prior_precision=2.0, **options, **more
    )
    la.fit(p.loader(), n_samples=None)
    return la, p.x


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dense_draws(la, x: Tensor, outputs: Tensor, n: int) -> Tensor:
    """F ± J (w_s − w) by a dense Jacobian, w_s from ``la.sample`` of the same generator."""
    jac = oracles.jacobian(la._target.model, x, la.coverage.covered)
    g = seeded()
    pairs = [jac @ (la.sample(1, g)[0] - la.mean) for _ in range((n + 1) // 2)]
    draws = [sign * d.reshape(outputs.shape) for d in pairs for sign in (1.0, -1.0)]
    return outputs + torch.stack(draws[:n])


@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS)
def test_draws_are_the_linearised_network_at_sampled_weights(
    subset: str, structure: str, options: dict
) -> None:
    la, x = fitted(subset, structure, options)
    x = x[:4]
    with torch.no_grad():
        outputs = la._target.model(x.clone())
    draws = la.functional_samples(x, n_samples=5, generator=seeded())
    assert_exact(draws, dense_draws(la, x, outputs, 5))
    probabilities = la.predictive_samples(x, n_samples=5, generator=seeded())
    assert_same(probabilities, torch.softmax(draws, -1))


@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS[::2])
def test_a_draw_is_one_function_on_every_batch(subset: str, structure: str, options: dict) -> None:
    la, x = fitted(subset, structure, options)
    whole = la.functional_samples(x, n_samples=6, generator=seeded())
    parts = [
        la.functional_samples(part, n_samples=n, generator=seeded())
        for part, n in ((x[:5], 6), (x[5:], 9))
    ]
    assert_same(torch.cat([parts[0], parts[1][:6]], dim=1), whole)
    assert_same(whole.mean(0), la.predictor.outputs(x))


@pytest.mark.parametrize("byte_budget", [1, 2**30])
def test_chunks_change_nothing(byte_budget: int) -> None:
    la, x = fitted("all", "kron", {}, byte_budget=byte_budget)
    other, _ = fitted("all", "kron", {})
    draws = [q.functional_samples(x, n_samples=3, generator=seeded()) for q in (la, other)]
    assert_same(*draws)


@pytest.mark.parametrize(("subset", "structure", "options"), POSTERIORS)
def test_draws_have_the_posteriors_moments(subset: str, structure: str, options: dict) -> None:
    """300 independent pairs, seed 0; every entry of the joint covariance of 4 samples.

    An estimate of Σ_ij from N draws has the standard error √((Σ_ii Σ_jj + Σ_ij²) / N). The largest
    of 78 entries (12 outputs) is beyond 4.5 of them with a probability below 78 · 7e-6 = 5e-4.
    """
    la, x = fitted(subset, structure, options, "mlp")
    x, n = x[:4], 300
    draws = la.functional_samples(x, n_samples=2 * n, generator=seeded())[::2]
    mean, sigma = la._glm_predictive_distribution(x, joint=True)
    deviations = draws.flatten(1) - mean
    estimate = deviations.T @ deviations / n
    variances = sigma.diagonal()
    error = ((variances[:, None] * variances + sigma.square()) / n).sqrt()
    assert float(((estimate - sigma).abs() / error).max()) < 4.5
    assert float((deviations.mean(0).abs() / (variances / n).sqrt()).max()) < 4.5
    # What shares no weights between samples would fail by far.
    apart = torch.block_diag(*(sigma[i : i + 3, i : i + 3] for i in range(0, 12, 3)))
    assert float(((estimate - apart).abs() / error).max()) > 4.5


def test_sequences_are_drawn_at_every_position_or_at_the_last() -> None:
    c = case("sequence")
    la = c.posterior()
    la.fit(c.loader())
    draws = la.functional_samples(c.x, n_samples=4, generator=seeded())
    assert_exact(draws, dense_draws(la, c.x, c.outputs(), 4))
    last = la.functional_samples(c.x, n_samples=4, generator=seeded(), positions="last")
    assert_exact(last, draws[:, :, -1])
    la, x = fitted("last_layer", "kron", {})
    other, _ = fitted("all", "kron", {})
    for posterior in (la, other):
        with pytest.raises(ValueError, match="positions='last' needs"):
            posterior.functional_samples(x, positions="last")


class NoForwardMode(torch.autograd.Function):
    """A function that knows its backward pass only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y.square())


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(NoForwardMode.apply(self.one(x)))


def test_what_has_no_forward_mode_goes_twice_backward() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Custom().double(), torch.randn(8, 4, dtype=torch.float64)
    y = torch.arange(8) % 3
    la = DebiasedLaplace(model, "classification")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=4), n_samples=None)
    draws = la.functional_samples(x, n_samples=3, generator=seeded())
    with torch.no_grad():
        outputs = model(x)
    jac = oracles.jacobian(model, x, la.coverage.covered)
    g = seeded()
    first = jac @ (la.sample(1, g)[0] - la.mean)
    assert_exact(draws[0], outputs + first)
    assert_exact(draws[1], outputs - first)


def test_both_ways_give_the_same_product() -> None:
    p = problem("cnn")
    network = FunctionalNetwork(p.model, tuple(p.names))
    direction = torch.randn(network.n_params, generator=seeded(), dtype=torch.float64)
    products = NetworkProducts(network)
    _, (forward,) = products.along(p.x, [direction])
    parameters = network.parameters()
    sizes = [value.numel() for value in parameters.values()]
    parts = direction.split(sizes)
    tangent = {
        name: part.reshape(value.shape)
        for (name, value), part in zip(parameters.items(), parts, strict=True)
    }
    assert_exact(twice_backward(network.function_of(p.x), parameters, tangent), forward)


def test_draws_are_differentiable_in_the_inputs() -> None:
    la, x = fitted("all", "kron", {}, enable_backprop=True)
    x = x[:2].clone().requires_grad_()

    def value(inputs: Tensor) -> Tensor:
        return la.functional_samples(inputs, n_samples=2, generator=seeded())[0].square().sum()

    (gradient,) = torch.autograd.grad(value(x), x)
    direction = torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)
    step = 1e-5 * direction
    with torch.no_grad():
        expected = (value(x + step) - value(x - step)) / 2e-5
    assert relative_error((gradient * direction).sum(), expected) <= 10 * FINITE_DIFFERENCE


def test_attention_takes_plain_kernels_inside_only() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(body, nn.Flatten(), nn.Linear(24, 3)).eval()
        x, y = torch.randn(6, 3, 8), torch.arange(6) % 3
    la = DebiasedLaplace(model, "classification")
    la.fit(DataLoader(TensorDataset(x, y), batch_size=3), n_samples=None)
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    draws = la.functional_samples(x, n_samples=100, generator=seeded())
    after = torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()
    assert after == before
    variances = la._glm_predictive_distribution(x, diagonal_output=True)[1]
    ratio = float(draws[::2].sub(draws.mean(0)).square().mean(0).div(variances).mean())
    assert ratio == pytest.approx(1.0, abs=6 * math.sqrt(2 / 50))
