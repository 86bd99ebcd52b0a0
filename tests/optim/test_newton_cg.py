"""The Newton optimiser."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from laplace_debiased.errors import ModelCallError
from laplace_debiased.optim import (
    MiniBatches,
    NewtonCG,
    Termination,
    debiased_cg,
    model_quadratic,
    newton_cg,
)
from laplace_debiased.optim.newton_cg import adapted
from tests.optim.models import batch, dense_curvature, tiny_cnn
from tests.optim.problems import generator, vector
from tests.optim.test_model_quadratic import Noisy, assert_same, snapshot

LOSS = nn.CrossEntropyLoss()
PAIR = MiniBatches(batch(6, 1), batch(5, 2))
PLAIN = {"levenberg_marquardt": False, "line_search": False}


def flat(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def mean_loss(model, data):
    with torch.no_grad():
        return LOSS(model(data[0]), data[1]).item()


def regression(seed, n=40):
    g = generator(seed)
    X = torch.randn(n, 5, generator=g, dtype=torch.float64)
    return X, X @ torch.randn(5, 2, generator=g, dtype=torch.float64) + 0.1


def least_squares(X, Y):
    ones = np.ones((len(X), 1))
    solution, *_ = np.linalg.lstsq(np.hstack([X.numpy(), ones]), Y.numpy(), rcond=None)
    return solution


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("options", [{}, PLAIN])
def test_one_step_solves_linear_regression(curvature, options):
    model = nn.Linear(5, 2, dtype=torch.float64)
    X, Y = regression(0)
    Y = Y + vector(80, 4).view(40, 2)
    exact = Termination(relative_residual=1e-12)
    optimizer = NewtonCG(
        model.parameters(),
        model,
        nn.MSELoss(),
        damping=0.0,
        curvature=curvature,
        termination=exact,
        **options,
    )
    before = nn.MSELoss()(model(X), Y).item()
    assert optimizer.step(lambda: MiniBatches((X, Y))) == pytest.approx(before)
    expected = least_squares(X, Y)
    np.testing.assert_allclose(model.weight.detach(), expected[:-1].T, rtol=1e-7)
    np.testing.assert_allclose(model.bias.detach(), expected[-1], rtol=1e-7)


def test_repeated_debiased_steps_reach_the_solution_that_two_batches_share():
    # Noise-free data: both batches have the same minimiser but other curvatures.
    model = nn.Linear(5, 2, dtype=torch.float64)
    X, Y = regression(0, n=80)
    pair = MiniBatches((X[:40], Y[:40]), (X[40:], Y[40:]))
    optimizer = NewtonCG(model.parameters(), model, nn.MSELoss(), damping=0.0)
    losses = [optimizer.step(lambda: pair) for _ in range(8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-12 * losses[0]


@pytest.mark.parametrize("single", [False, True])
def test_a_plain_step_adds_lr_times_the_solution_of_debiased_cg(single):
    model = tiny_cnn()
    start = flat(model)
    quadratics = [model_quadratic(model, LOSS, [data], damping=0.1) for data in PAIR]
    rule = Termination(10)
    expected = debiased_cg(quadratics[0], None if single else quadratics[1], termination=rule)
    optimizer = NewtonCG(
        model.parameters(), model, LOSS, lr=0.5, damping=0.1, termination=rule, **PLAIN
    )
    optimizer.step(lambda: MiniBatches(PAIR.directions) if single else PAIR)
    torch.testing.assert_close(flat(model), start + 0.5 * expected.solution)
    report = optimizer.last_step
    assert report.loss_after is None
    assert report.reduction_ratio is None
    assert report.next_damping == report.damping == 0.1


def test_the_same_batch_twice_is_single_mode():
    costs = []
    for second in (None, PAIR.directions):
        model = tiny_cnn()
        optimizer = NewtonCG(model.parameters(), model, LOSS)
        optimizer.step(lambda second=second: (PAIR.directions, second))
        costs.append((optimizer.last_step.sample_gradients, flat(model).tolist()))
    assert costs[0] == costs[1]


def test_the_report_agrees_with_the_model():
    model = tiny_cnn()
    start, before = flat(model), mean_loss(model, PAIR.magnitudes)
    H = dense_curvature(tiny_cnn(), LOSS, *PAIR.magnitudes, "ggn")
    g = model_quadratic(tiny_cnn(), LOSS, [PAIR.magnitudes]).gradient
    optimizer = NewtonCG(model.parameters(), model, LOSS, damping=0.3)
    assert optimizer.step(lambda: PAIR) == pytest.approx(before)
    report = optimizer.last_step
    assert report.loss == pytest.approx(before)
    after = mean_loss(model, PAIR.magnitudes)
    assert report.loss_after == pytest.approx(after)
    x = flat(model) - start
    predicted = (g @ x + 0.5 * x @ H @ x).item()
    assert report.predicted_change == pytest.approx(predicted, rel=1e-6)
    assert report.reduction_ratio == pytest.approx((after - before) / predicted, rel=1e-6)
    assert report.next_damping == adapted(0.3, report.reduction_ratio)
    assert optimizer.param_groups[0]["damping"] == report.next_damping


def test_the_cost_of_a_step_is_counted():
    model = tiny_cnn()
    optimizer = NewtonCG(
        model.parameters(), model, LOSS, termination=Termination(3, relative_residual=0.0)
    )
    optimizer.step(lambda: PAIR)
    # 6 and 5 samples: a gradient and three products each, one loss on the magnitudes.
    assert optimizer.last_step.step_size == 1.0
    assert optimizer.last_step.sample_gradients == pytest.approx(6 * 7 + 5 * 7 + 5 / 3)
    optimizer.step(lambda: PAIR)
    group = optimizer.param_groups[0]
    assert group["n_steps"] == 2
    assert group["sample_gradients"] > 2 * 77


def test_the_line_search_makes_the_magnitude_batch_descend():
    model = tiny_cnn()
    # A small damping on 6 samples: the full step overshoots.
    optimizer = NewtonCG(model.parameters(), model, LOSS, lr=64.0, damping=1e-6)
    for _ in range(5):
        before = mean_loss(model, PAIR.magnitudes)
        optimizer.step(lambda: PAIR)
        assert mean_loss(model, PAIR.magnitudes) <= before
    assert optimizer.last_step.step_size < 64.0


class Cliff(nn.Module):
    """A loss that is infinite beyond a distance from where it starts."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return torch.where(self.w.abs() > 1e-3, torch.inf, self.w) * x


CLIFF = MiniBatches((torch.ones(2, 1).double(), torch.ones(2, 1).double()))


def test_a_step_off_a_cliff_is_refused_and_the_damping_grows():
    model = Cliff()
    optimizer = NewtonCG(model.parameters(), model, nn.MSELoss(), damping=0.1, line_search=False)
    optimizer.step(lambda: CLIFF)
    assert model.w.item() == 0.0
    assert optimizer.last_step.step_size == 0.0
    assert optimizer.last_step.reduction_ratio == -math.inf
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.15)


def test_the_line_search_stays_on_the_cliff(monkeypatch):
    model = Cliff()
    NewtonCG(model.parameters(), model, nn.MSELoss()).step(lambda: CLIFF)
    assert 0 < model.w.item() <= 1e-3
    monkeypatch.setattr(newton_cg, "_MAX_TRIALS", 2)
    short = NewtonCG((model := Cliff()).parameters(), model, nn.MSELoss())
    short.step(lambda: CLIFF)
    assert model.w.item() == 0.0
    assert short.param_groups[0]["damping"] > 1e-2


def test_negative_curvature_of_the_hessian_makes_the_damping_grow():
    class Saddle(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.1, 0.1], dtype=torch.float64))

        def forward(self, x):
            return (self.w[0] * self.w[1]).expand(len(x), 1)

    model, data = Saddle(), MiniBatches((torch.ones(2, 1), torch.full((2, 1), 5.0).double()))
    optimizer = NewtonCG(model.parameters(), model, nn.MSELoss(), curvature="hessian", damping=1e-3)
    before = optimizer.step(lambda: data)
    assert optimizer.last_step.next_damping > 1e-3
    assert optimizer.step(lambda: data) < before  # the absolute step has descended


def test_a_stationary_point_is_left_in_peace():
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    X = torch.ones(3, 2, dtype=torch.float64)
    optimizer = NewtonCG(model.parameters(), model, nn.MSELoss(), damping=0.5)
    start = flat(model)
    optimizer.step(lambda: MiniBatches((X, model(X).detach())))
    torch.testing.assert_close(flat(model), start)
    assert optimizer.last_step.reduction_ratio is None
    assert optimizer.param_groups[0]["damping"] == 0.5


def test_the_state_dict_round_trips_and_training_goes_on_as_if_uninterrupted():
    def make():
        model = tiny_cnn()
        return model, NewtonCG(model.parameters(), model, LOSS, lr=0.7, damping=0.05)

    model, optimizer = make()
    for _ in range(2):
        optimizer.step(lambda: PAIR)
    stored = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    other_model, other = make()
    other_model.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    assert other.state_dict() == optimizer.state_dict()
    assert other.param_groups[0]["n_steps"] == 2
    assert optimizer.param_groups[0]["damping"] != 0.05
    for one in (optimizer, other):
        one.step(lambda: PAIR)
    assert torch.equal(flat(model), flat(other_model))


def test_a_learning_rate_scheduler_works():
    model = tiny_cnn()
    optimizer = NewtonCG(model.parameters(), model, LOSS, **PLAIN)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step(lambda: PAIR)
    scheduler.step()
    optimizer.step(lambda: PAIR)
    assert optimizer.last_step.step_size == 0.5


def failing_closure():
    raise OSError("the loader failed")


NAN = MiniBatches(PAIR.directions, (PAIR.magnitudes[0] * torch.nan, PAIR.magnitudes[1]))


@pytest.mark.parametrize(
    ("closure", "error"),
    [
        (failing_closure, OSError),
        (lambda: NAN, RuntimeError),
        (lambda: PAIR.directions, TypeError),
        (lambda: None, TypeError),
        (None, TypeError),
    ],
)
def test_a_failure_leaves_the_parameters_and_the_state(closure, error):
    model = tiny_cnn()
    optimizer = NewtonCG(model.parameters(), model, LOSS)
    optimizer.step(lambda: PAIR)
    before, report = flat(model), optimizer.last_step
    state = optimizer.state_dict()["param_groups"][0].copy()
    with pytest.raises(error):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)
    assert optimizer.state_dict()["param_groups"][0] == state
    assert optimizer.last_step is report


@pytest.mark.parametrize("call_that_fails", [1, 2, 3])
def test_a_model_that_fails_anywhere_in_the_step_is_left_alone(call_that_fails):
    model, calls = Noisy(), []

    def fail(*_):
        calls.append(1)
        if len(calls) == call_that_fails:
            raise KeyError("a failure inside the model")

    optimizer = NewtonCG(model.parameters(), model, LOSS)
    handle = model.register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(ModelCallError, match="a failure inside the model") as raised:
        optimizer.step(lambda: PAIR)
    assert isinstance(raised.value.__cause__, KeyError)
    assert_same(before, snapshot(model))
    assert len(calls) == call_that_fails
    handle.remove()
    assert len(model._forward_pre_hooks) == 0


def test_a_step_changes_nothing_but_the_parameters():
    model = Noisy()
    model.inner[0].weight.grad = torch.ones_like(model.inner[0].weight)
    optimizer = NewtonCG(model.parameters(), model, LOSS)
    before = snapshot(model)
    with torch.no_grad():
        optimizer.step(lambda: PAIR)
    after = snapshot(model)
    moved = {name for name in before[1] if not torch.equal(before[1][name], after[1][name])}
    assert moved == {name for name, _ in model.named_parameters()}
    assert_same(before[:1] + before[2:], after[:1] + after[2:])
    assert not any(p.grad_fn for p in model.parameters())


def test_frozen_parameters_stay():
    model = tiny_cnn()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    optimizer = NewtonCG(model.parameters(), model, LOSS)
    optimizer.step(lambda: PAIR)
    assert torch.equal(model[0].weight, frozen)
    assert optimizer.last_step.cg.solution.numel() == sum(p.numel() for p in model[4].parameters())


def test_bad_construction_is_named():
    model = tiny_cnn()
    params = list(model.parameters())
    with pytest.raises(ValueError, match="lr"):
        NewtonCG(params, model, LOSS, lr=0.0)
    with pytest.raises(ValueError, match="damping"):
        NewtonCG(params, model, LOSS, damping=float("nan"))
    with pytest.raises(ValueError, match="one group"):
        NewtonCG([{"params": params[:1]}, {"params": params[1:]}], model, LOSS)
    with pytest.raises(ValueError, match="a tensor that model lacks"):
        NewtonCG(tiny_cnn().parameters(), model, LOSS)
    with pytest.raises(ValueError, match='reduction="mean"'):
        NewtonCG(params, model, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="curvature must be one of"):
        NewtonCG(params, model, LOSS, curvature="fisher")
