"""Rules of single layers, their registry, and what they leave behind."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased.curvature import (
    LinearMapRule,
    layers,
    register_layer_rule,
    registered_rules,
    rule_for,
)
from laplace_debiased.curvature.rows import MAX_DENSE_VECTOR, token_factor
from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.fuzz.networks import LENGTH, WIDTH, Attention, Tokens
from tests.tolerances import FINITE_DIFFERENCE, assert_exact, assert_same, relative_error
from tests.zoo import Problem, problem


class Pooled(nn.Module):
    """Layers over positions, averaged before the head."""

    def __init__(self, *stages: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stages(x)).flatten(1, -2).mean(1))


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


def sequences(model: nn.Module, n: int = 24) -> Problem:
    generator = torch.Generator().manual_seed(0)
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        x = torch.randint(6, (n, LENGTH), generator=generator)
    else:
        x = torch.randn(n, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    return Problem(model.double().eval(), x, y, "classification")


def networks() -> dict[str, Problem]:
    """One network for each way in which rows are stored."""
    grouped = Pooled(nn.Conv1d(LENGTH, 2 * LENGTH, 2, groups=LENGTH, padding=1), width=WIDTH + 1)
    transposed = nn.ConvTranspose1d(LENGTH, 4, 2, groups=2, stride=2)
    return {
        "attention": sequences(Pooled(Attention(2, True, True, None))),
        "cross_attention": sequences(Pooled(Attention(1, True, False, 6))),
        "embedding": sequences(Pooled(Tokens(0, "read"), nn.LayerNorm(WIDTH))),
        "grouped": sequences(grouped),
        "transposed": sequences(Pooled(transposed, width=2 * WIDTH)),
        "batch_norm": sequences(Pooled(nn.BatchNorm1d(LENGTH), nn.GELU())),
    }


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    NETWORKS = networks()


def fitted(p: Problem, **options: object) -> DebiasedKronLaplace:
    la = DebiasedKronLaplace(p.model, p.likelihood, strict=True, **options)
    la.fit(p.loader(), n_samples=16, seed=3)
    return la


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_chunks_change_nothing_under_any_sampling(kind: str, sampling: str) -> None:
    p = NETWORKS[kind]
    whole, tiny = (fitted(p, sampling=sampling, byte_budget=size) for size in (2**28, 1))
    assert_same(tiny.H.to_matrix(), whole.H.to_matrix())
    assert_same(tiny(p.x, link_approx="probit"), whole(p.x, link_approx="probit"))


@pytest.mark.parametrize("kind", NETWORKS)
def test_models_are_left_as_they_were(kind: str, untouched) -> None:
    p = NETWORKS[kind]
    with untouched(p.model):
        la = fitted(p)
        la(p.x)
        la(p.x, pred_type="nn", n_samples=2, generator=torch.Generator())


@pytest.mark.parametrize("kind", ["attention", "cross_attention", "grouped", "batch_norm"])
def test_gradients_of_predictions_equal_finite_differences(kind: str) -> None:
    p = NETWORKS[kind]
    la = fitted(p, enable_backprop=True)
    x = p.x[:2].clone().requires_grad_()
    mix = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    (actual,) = torch.autograd.grad((la(x) * mix).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        high, low = (la(x + sign * 1e-5 * direction) for sign in (1, -1))
    expected = ((high - low) * mix).sum() / 2e-5
    assert relative_error((actual * direction).sum(), expected) <= 10 * FINITE_DIFFERENCE


@pytest.mark.parametrize("kind", NETWORKS)
def test_samples_have_the_posteriors_covariance(kind: str) -> None:
    """4 000 draws, seed 0: an entry of the diagonal is off by 2.2 % (one standard error)."""
    la = fitted(NETWORKS[kind], prior_precision=5.0)
    draws = la.sample(4000, torch.Generator().manual_seed(0)).double() - la.mean
    ratio = draws.square().mean(0) / la.posterior_precision.diag(-1)
    assert float((ratio - 1).abs().max()) < 0.022 * 5


def test_padding_of_keys_is_masked_as_in_the_network() -> None:
    class Masked(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -1] = True
            out = self.stages[0].inner(x, x, x, key_padding_mask=padding)[0]
            return self.head(out.mean(1))

    p = sequences(Masked(Attention(2, True, True, None)))
    la = DebiasedKronLaplace(p.model, scheme="single", strict=True)
    la.fit(p.loader(), n_samples=None, n_data=1)
    expected = oracles.directional(la.H, oracles.ggn(p, la.coverage.covered))
    assert_exact(oracles.table(la.H), expected)


def test_attention_of_one_sequence_without_a_batch_is_left_out() -> None:
    class Unbatched(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            inner = self.stages[0].inner
            return self.head(torch.stack([inner(s, s, s)[0].mean(0) for s in x]))

    p = sequences(Unbatched(Attention(2, True, True, None)))
    la = DebiasedKronLaplace(p.model)
    la.fit(p.loader())
    assert la.coverage.covered == ("head.weight", "head.bias")


def test_large_scales_get_a_diagonal_block() -> None:
    width = MAX_DENSE_VECTOR + 1
    model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2)).double()
    model[1].requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, width, generator=generator, dtype=torch.float64)
    p = Problem(model, x, torch.arange(6) % 2, "classification")
    la = DebiasedKronLaplace(model, scheme="single")
    la.fit(p.loader(), n_data=1)
    assert [block.output_basis for block in la.H.blocks] == [None, None]
    jac = oracles.jacobian(model, x, la.coverage.covered)
    middle = oracles.loss_hessians(p.likelihood, model(x).detach(), p.y)
    expected = torch.einsum("mcp,mcd,mdp->p", jac, middle, jac) / len(x)
    assert_exact(oracles.table(la.H), expected)


def test_kfac_factors_of_shared_weights_are_the_papers() -> None:
    p = problem("head_positions", "regression", n=12)
    la = DebiasedKronLaplace(p.model, "regression", scheme="single", magnitudes="kfac")
    la.fit(p.loader(), n_data=1)
    a = torch.tanh(p.model.inner(p.x)).detach().flatten(1, 2)  # the head's inputs
    positions = a.shape[1]
    g = torch.eye(3, dtype=torch.float64).expand(12, positions, 3, 3) / positions
    inputs = torch.einsum("nti,ntj->ij", a, a) / (12 * a.shape[1])
    outputs = torch.einsum("ntri,ntrj->ij", g, g) / 12
    block = dict(zip(la.coverage.covered, la.H_facs.kfacs, strict=True))["head.weight"]
    assert_exact(block[0], outputs)
    assert_exact(block[1], inputs)


def test_token_factor_is_the_diagonal_of_one_hot_inputs() -> None:
    tokens = torch.tensor([[0, 2, 2, -1], [1, 1, 1, 1], [-1, -1, 3, 0]])
    counts = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    hot = torch.eye(5, dtype=torch.float64)[tokens.clamp_min(0)] * (tokens >= 0).unsqueeze(-1)
    expected = torch.einsum("n,ntv,ntv->v", counts, hot, hot) / hot.shape[1]
    assert_exact(token_factor(tokens, 5, counts), expected)


class Halving(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class HalvingRule(LinearMapRule):
    def output_positions(self, module: nn.Module, cotangents: Tensor) -> Tensor:
        return super().output_positions(module, cotangents) / 2


@pytest.fixture
def registry():
    """The registry, put back afterwards."""
    before = dict(layers._RULES)
    yield
    layers._RULES.clear()
    layers._RULES.update(before)


def halving_problem() -> Problem:
    p = problem("mlp")
    return Problem(nn.Sequential(Halving(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), p.x, p.y,
                   p.likelihood)  # fmt: skip


def test_registered_rule_covers_its_layer(registry) -> None:
    assert rule_for(Halving(2, 2)) is None
    register_layer_rule(Halving, HalvingRule())
    assert Halving in registered_rules()
    p = halving_problem()
    la = DebiasedKronLaplace(p.model, scheme="single", strict=True)
    la.fit(p.loader(), n_data=1)
    expected = oracles.directional(la.H, oracles.ggn(p, p.names))
    assert_exact(oracles.table(la.H), expected)


def test_wrong_rule_is_found_out_at_the_fit(registry) -> None:
    register_layer_rule(Halving, LinearMapRule())
    la = DebiasedKronLaplace(halving_problem().model)
    la.fit(halving_problem().loader())
    assert "not the sum over positions" in la.coverage.excluded["0.weight"]


def test_second_rule_for_a_type_needs_override(registry) -> None:
    register_layer_rule(Halving, LinearMapRule())
    with pytest.raises(ValueError, match="Halving has a rule already; pass override=True"):
        register_layer_rule(Halving, HalvingRule())
    register_layer_rule(Halving, HalvingRule(), override=True)
    assert isinstance(rule_for(Halving(2, 2)), HalvingRule)


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (int, LinearMapRule(), "must be a torch.nn.Module type"),
        (Halving, HalvingRule, "must be an instance"),
        (Halving, object(), "parameters, transposed, unsupported, rows, input_factor"),
    ],
)
def test_what_is_no_rule_or_no_layer_is_refused(kind: type, rule: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register_layer_rule(kind, rule)


def test_documented_example_runs(registry) -> None:
    assert doctest.testmod(layers).failed == 0
