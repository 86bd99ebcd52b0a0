"""Rules of operations, what the recorder makes of a network, and what it leaves behind."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased.curvature import (
    LinearRule,
    OperationCall,
    Reading,
    RuleDefaults,
    register_operation_rule,
    registered_operations,
)
from laplace_debiased.curvature.operations import call
from laplace_debiased.curvature.rows import MatrixRows, input_factor
from laplace_debiased.curvature.rows.parameters import MAX_DENSE_VECTOR, token_factor
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
    (actual,) = torch.autograd.grad((la(x, link_approx="probit") * mix).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        ends = (x + sign * 1e-5 * direction for sign in (1, -1))
        high, low = (la(end, link_approx="probit") for end in ends)
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


def test_attention_of_one_sequence_at_a_time_goes_through_torch_func() -> None:
    class Unbatched(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            inner = self.stages[0].inner
            return self.head(torch.stack([inner(s, s, s)[0].mean(0) for s in x]))

    p = sequences(Unbatched(Attention(2, True, True, None)))
    la = DebiasedKronLaplace(p.model, scheme="single", strict=True)
    la.fit(p.loader(), n_data=1)
    assert la.coverage.general == {n for n, _ in p.model.named_parameters() if "stages" in n}
    expected = oracles.directional(la.H, oracles.ggn(p, la.coverage.covered))
    assert_exact(oracles.table(la.H), expected)


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


class Quadratic(nn.Module):
    """A parameter in an operation that has no rule."""

    def __init__(self, width: int = 70) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, width), nn.Linear(1, 3)
        self.form = nn.Parameter(torch.randn(1, width, width) / width)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.inner(x))
        return self.head(nn.functional.bilinear(inner, inner, self.form))


class QuadraticRule(RuleDefaults):
    def readings(self, x: Tensor, y: Tensor, weight: Tensor, bias: object = None) -> tuple:
        return (Reading({"weight": weight}, (x, y)),)

    def matrix(self, slot: str, argument: Tensor, settings: object) -> Tensor:
        return argument[0]

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> MatrixRows:
        x, y = call.inputs
        return MatrixRows(y.unsqueeze(1), (columns[0] * x.unsqueeze(1)).unsqueeze(2))

    def input_factor(self, call: OperationCall, slot: str, counts: Tensor | None = None) -> object:
        return input_factor(call.inputs[1].unsqueeze(1), counts)


class WrongRule(QuadraticRule):
    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> MatrixRows:
        rows = super().rows(call, slot, columns)
        return MatrixRows(rows.inputs, 2 * rows.columns)


@pytest.fixture
def registry():
    """The registry, put back afterwards."""
    before = dict(call._RULES)
    yield
    call._RULES.clear()
    call._RULES.update(before)


def quadratic_problem() -> Problem:
    p = problem("mlp")
    return Problem(Quadratic().double(), p.x, p.y, p.likelihood)


def test_an_operation_without_a_rule_is_named(registry) -> None:
    p = quadratic_problem()
    la = DebiasedKronLaplace(p.model)
    la.fit(p.loader())
    assert la.coverage.excluded == {"form": "it goes through bilinear: has no rule"}


def test_registered_rule_covers_its_operation(registry) -> None:
    register_operation_rule(nn.functional.bilinear, QuadraticRule())
    assert nn.functional.bilinear in registered_operations()
    p = quadratic_problem()
    la = DebiasedKronLaplace(p.model, scheme="single", strict=True)
    la.fit(p.loader(), n_data=1)
    expected = oracles.directional(la.H, oracles.ggn(p, la.coverage.covered))
    assert_exact(oracles.table(la.H), expected)


def test_wrong_rule_is_found_out_at_the_fit(registry) -> None:
    register_operation_rule(nn.functional.bilinear, WrongRule())
    p = quadratic_problem()
    la = DebiasedKronLaplace(p.model)
    la.fit(p.loader())
    assert "not the sum over positions" in la.coverage.excluded["form"]


def test_second_rule_for_a_function_needs_override(registry) -> None:
    register_operation_rule(nn.functional.bilinear, WrongRule())
    with pytest.raises(ValueError, match="bilinear has a rule already; pass override=True"):
        register_operation_rule(nn.functional.bilinear, QuadraticRule())
    register_operation_rule(nn.functional.bilinear, QuadraticRule(), override=True)
    assert type(registered_operations()[nn.functional.bilinear]) is QuadraticRule


@pytest.mark.parametrize(
    ("function", "rule", "message"),
    [
        (nn.Linear, LinearRule(), "must be a function of torch"),
        (torch.dot, LinearRule, "must be an instance"),
        (torch.dot, object(), "readings, matrix, rows, input_factor"),
    ],
)
def test_what_is_no_rule_or_no_function_is_refused(
    function: object, rule: object, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        register_operation_rule(function, rule)


def test_documented_example_runs(registry) -> None:
    assert doctest.testmod(call).failed == 0
