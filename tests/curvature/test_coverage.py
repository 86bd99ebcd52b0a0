"""What carries a posterior, what is left out and why, and who is told."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.curvature import host_coverage, operation_coverage
from laplace_debiased.errors import CoverageError
from laplace_debiased.network.substitution import call_with
from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.tolerances import assert_exact
from tests.zoo import Problem, problem

INDICES = DataLoader(TensorDataset(torch.randint(7, (12, 4)), torch.arange(12) % 3), batch_size=5)


class OwnNorm(nn.LayerNorm):
    """A subclass that computes something else than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


class Mixed(nn.Module):
    """All kinds side by side; the table's gradients depend on the batch, the gate has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, scale_grad_by_freq=True)
        self.norm = OwnNorm(4)
        self.token = nn.Parameter(torch.zeros(4))
        self.hidden = nn.Linear(4, 5)
        self.gate = nn.PReLU(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(self.norm(self.embedding(x).mean(1) + self.token))
        return self.head(torch.tanh(self.gate(hidden)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Reused(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.second = self.first


class Unused(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.second(x)
        return self.head(torch.tanh(self.first(x)))


class Functional(Unused):
    """Uses a layer's weight outside of the layer too."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x) + x @ self.first.weight)
        return self.head(self.second(hidden))


class TimeFirst(Unused):
    """A layer that sees positions in front of the samples."""

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([x, 2 * x, -x])
        return self.head(self.second(torch.tanh(self.first(stacked))).mean(0))


def fitted(model: nn.Module, **options: object) -> DebiasedKronLaplace:
    la = DebiasedKronLaplace(model.double(), **options)
    la.fit(problem("mlp").loader())
    return la


def test_what_cannot_be_covered_is_left_out_and_named() -> None:
    model = Mixed()
    la = DebiasedKronLaplace(model)
    assert la.coverage.excluded == {}  # no forward pass has shown more
    la.fit(INDICES)
    assert set(la.coverage.excluded) == {"embedding.weight"}
    assert "depend on the batch" in la.coverage.excluded["embedding.weight"]
    covered = sum(dict(model.named_parameters())[name].numel() for name in la.coverage.covered)
    assert la.n_params == len(la.mean) == covered
    assert la.n_layers == len(la.params) == len(la.coverage.covered)
    assert la.coverage.share == pytest.approx(covered / sum(p.numel() for p in model.parameters()))
    assert "scale_grad_by_freq" in str(la.coverage)


def test_left_out_parameters_stay_at_the_map_in_samples_of_the_network() -> None:
    la = DebiasedKronLaplace(Mixed())
    la.fit(INDICES)
    x = next(iter(INDICES))[0]
    la.prior_precision, expected = 1e12, torch.softmax(la.model.eval()(x), -1)
    for n_samples in (1, 5):
        actual = la(x, pred_type="nn", n_samples=n_samples)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_covered_layers_among_left_out_ones_have_the_dense_curvature() -> None:
    torch.manual_seed(0)
    x, y = next(iter(DataLoader(INDICES.dataset, batch_size=12)))
    p = Problem(Mixed().double(), x, y, "classification")
    p.model.eval()
    la = DebiasedKronLaplace(p.model, scheme="single")
    la.fit(p.loader(), n_data=1)
    names = la.coverage.covered
    assert_exact(oracles.table(la.H), oracles.directional(la.H, oracles.ggn(p, names)))


@pytest.mark.parametrize(
    ("model", "excluded", "why"),
    [
        (Unused(), {"second.weight", "second.bias"}, "affects the outputs"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_only_a_forward_pass_shows_is_left_out_at_fit(
    model: nn.Module, excluded: set[str], why: str
) -> None:
    la = fitted(model)
    assert set(la.coverage.excluded) == excluded
    data = problem("mlp")
    p = Problem(model, data.x, data.y, data.likelihood)
    single = fitted(model, scheme="single")
    expected = oracles.directional(single.H, oracles.ggn(p, single.coverage.covered))
    assert_exact(oracles.table(single.H), len(p.x) * expected)
    with pytest.raises(CoverageError, match=why):
        fitted(model, strict=True)


@pytest.mark.parametrize(
    "model", [Reused(), Tied(), Functional(), TimeFirst()], ids=lambda m: type(m).__name__
)
def test_whatever_a_weight_is_read_by_it_is_one_block(model: nn.Module) -> None:
    data = problem("mlp")
    la = fitted(model, scheme="single", strict=True)
    p = Problem(model, data.x, data.y, data.likelihood)
    expected = oracles.directional(la.H, oracles.ggn(p, la.coverage.covered))
    assert_exact(oracles.table(la.H), len(p.x) * expected)


def test_reparametrised_weights_name_the_parametrisation() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(32, 4)),
        parametrizations.orthogonal(nn.Linear(4, 4)),
        nn.Linear(4, 3),
    )
    coverage = operation_coverage(model)
    assert coverage.covered == ("0.bias", "1.bias", "2.weight", "2.bias")
    why = coverage.excluded["0.parametrizations.weight.original1"]
    assert why == "Linear.weight is re-parametrised by WeightNorm"
    assert "Orthogonal" in coverage.excluded["1.parametrizations.weight.original"]


def test_batch_norm_that_mixes_samples_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    la = DebiasedKronLaplace(model.double())
    with pytest.raises((ValueError, CoverageError)):
        la.fit(problem("mlp").loader())


def test_only_what_the_hosts_backends_get_right_is_theirs() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.BatchNorm2d(2), nn.Linear(4, 3)
    )
    coverage, layers = host_coverage(model)
    assert [layer.name for layer in layers] == ["0", "3"]
    assert {name.split(".")[0] for name in coverage.covered} == {"0", "3"}
    assert "not supported by the backend" in coverage.excluded["1.weight"]
    assert "BatchNorm2d" in coverage.excluded["2.bias"]


def test_strict_raises_at_the_fit_and_names_the_gaps() -> None:
    la = DebiasedKronLaplace(Mixed(), strict=True)
    with pytest.raises(CoverageError, match=r"embedding\.weight: it goes through .*scale_grad"):
        la.fit(INDICES)


def test_low_coverage_is_said_aloud_with_reasons_and_remedies() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.head = nn.LSTM(4, 40, batch_first=True), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells(x.unsqueeze(1))[0][:, -1])

    la = DebiasedKronLaplace(Recurrent().double())
    with pytest.warns(UserWarning, match=r"only 123 of .* goes through lstm: has no rule") as seen:
        la.fit(problem("mlp").loader())
    message = str(seen[0].message)
    assert all(word in message for word in ("register_operation_rule", "lowrank", "last_layer"))
    la = DebiasedKronLaplace(Mixed())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.fit(INDICES)


def test_a_long_table_is_grouped_by_module_and_reason() -> None:
    stages = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(9)]
    model = nn.Sequential(*stages, nn.Linear(4, 3))
    model[0].requires_grad_(False)
    coverage = operation_coverage(model)
    short, long = str(coverage), coverage.table(whole=True)
    assert len(short.splitlines()) < 15 < 38 < len(long.splitlines())
    assert "frozen by the user" in short
    assert "8.1.bias" in long


def test_frozen_parameters_are_no_gap_under_strict() -> None:
    model = Mixed()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("hidden", "head")))
    la = DebiasedKronLaplace(model, strict=True)
    la.fit(INDICES)
    assert la.coverage.gaps == {}
    assert "frozen by the user" in la.coverage.excluded["norm.weight"]


def test_nothing_to_cover_is_an_error_that_names_every_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.requires_grad_(False)
    with pytest.raises(CoverageError, match=r"0\.bias: frozen"):
        DebiasedKronLaplace(model)


def test_vector_prior_that_no_longer_fits_names_the_tensors_and_loses_nothing() -> None:
    la = DebiasedKronLaplace(Unused().double(), prior_precision=torch.arange(1.0, 7.0))
    with pytest.raises(ValueError, match=r"4 here: first\.weight, first\.bias, head\.weight"):
        la.fit(problem("mlp").loader())
    assert la.n_layers == 6


def test_vector_prior_mean_that_no_longer_fits_is_refused() -> None:
    model = Unused().double()
    n = sum(p.numel() for p in model.parameters())
    la = DebiasedKronLaplace(model, prior_mean=torch.zeros(n))
    with pytest.raises(ValueError, match=f"prior_mean has {n} entries"):
        la.fit(problem("mlp").loader())


def test_order_of_the_covered_parameters_is_the_models() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.first = nn.Linear(5, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.first(x)))

    p = problem("mlp")
    la = fitted(model := Reversed(), scheme="single")
    assert la.coverage.covered == tuple(name for name, _ in model.named_parameters())
    q = Problem(model, p.x, p.y, p.likelihood)
    expected = len(p.x) * oracles.directional(la.H, oracles.ggn(q, la.coverage.covered))
    assert_exact(oracles.table(la.H), expected)


def test_dead_relu_is_covered_with_zero_curvature() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1e3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la = fitted(model)
    assert la.n_layers == 4
    assert float(la.H.blocks[0].eigenvalues.max()) == 0.0
    assert torch.isfinite(la.log_marginal_likelihood())


def test_module_with_two_names_is_covered_once_and_survives_sampled_networks(untouched) -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            self.head = self.layers[-1]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    la = fitted(model := Alias(), strict=True)
    assert la.coverage.covered[-1] == "layers.2.bias"
    x, generator = problem("mlp").x, torch.Generator().manual_seed(0)
    with untouched(model):
        la(x, pred_type="nn", n_samples=2, generator=generator)
    assert all(isinstance(p, nn.Parameter) for p in model.head.parameters())


def test_values_reach_every_place_of_a_tied_parameter() -> None:
    p, model = problem("mlp"), Tied().double()
    values = {name: torch.randn_like(q) for name, q in model.named_parameters()}
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for name, q in expected.named_parameters():
            q.copy_(values[name])
    assert torch.equal(call_with(model, values, (p.x,)), expected(p.x))
