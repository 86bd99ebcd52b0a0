"""Local quadratics against dense automatic differentiation."""

import curvlinops
import pytest
import torch
from torch import nn

from laplace_debiased.errors import ModelCallError
from laplace_debiased.optim import Quadratic, debiased_cg, model_quadratic
from tests.optim.models import LOSSES, batch, dense_curvature, flat_loss, tiny_cnn
from tests.optim.problems import RTOL, vector


def matrix(q):
    return torch.stack([q.product(row) for row in torch.eye(q.dimension).to(q.gradient)])


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("name", LOSSES)
def test_curvature_and_gradient_match_dense_automatic_differentiation(name, kind):
    model, loss_func, (X, y) = tiny_cnn(), LOSSES[name], batch(5, 1, name)
    q = model_quadratic(model, loss_func, [(X, y)], curvature=kind)
    expected = dense_curvature(model, loss_func, X, y, kind)
    torch.testing.assert_close(matrix(q), expected, rtol=RTOL, atol=1e-12)
    _, loss, theta = flat_loss(model, loss_func, X, y)
    slope = torch.autograd.functional.jacobian(loss, theta)
    torch.testing.assert_close(q.gradient, slope, rtol=RTOL, atol=1e-14)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_an_operator_of_curvlinops_gives_the_same_solution(kind):
    model, loss_func = tiny_cnn(), nn.CrossEntropyLoss()
    data, other = batch(6, 1), batch(6, 2)
    make = {"ggn": curvlinops.GGNLinearOperator, "hessian": curvlinops.HessianLinearOperator}[kind]

    def theirs(pair):
        operator = make(model, loss_func, list(model.parameters()), [pair])
        return Quadratic(operator, model_quadratic(model, loss_func, [pair]).gradient, 1.0)

    def ours(pair):
        return model_quadratic(model, loss_func, [pair], curvature=kind, damping=1.0)

    found = debiased_cg(ours(data), ours(other), keep_vectors=False)
    expected = debiased_cg(theirs(data), theirs(other), keep_vectors=False)
    torch.testing.assert_close(found.solution, expected.solution, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (1, 5, 1)])
def test_cutting_the_data_into_other_batches_changes_nothing(sizes):
    model, (X, y) = tiny_cnn(), batch(7, 1)
    data = list(zip(X.split(sizes), y.split(sizes), strict=True))
    whole = model_quadratic(model, nn.CrossEntropyLoss(), [(X, y)])
    cut = model_quadratic(model, nn.CrossEntropyLoss(), data)
    torch.testing.assert_close(cut.gradient, whole.gradient, rtol=RTOL, atol=1e-14)
    torch.testing.assert_close(matrix(cut), matrix(whole), rtol=RTOL, atol=1e-14)


def test_the_order_of_the_parameters_permutes_the_quadratic():
    model, data = tiny_cnn(), [batch(4, 1)]
    params = list(model.parameters())
    plain = model_quadratic(model, nn.CrossEntropyLoss(), data, params=params)
    turned = model_quadratic(model, nn.CrossEntropyLoss(), data, params=params[::-1])
    index = torch.arange(plain.dimension).split([p.numel() for p in params])
    order = torch.cat(index[::-1])
    torch.testing.assert_close(turned.gradient, plain.gradient[order])
    torch.testing.assert_close(matrix(turned), matrix(plain)[order][:, order])


def test_frozen_and_unused_parameters():
    model, data = tiny_cnn(), [batch(4, 1)]
    full = matrix(model_quadratic(model, nn.CrossEntropyLoss(), data))
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    model[0].requires_grad_(False)
    some = model_quadratic(model, nn.CrossEntropyLoss(), data)
    n = some.dimension - 2
    # The module's own parameters come before those of its children.
    torch.testing.assert_close(matrix(some)[2:, 2:], full[-n:, -n:])
    assert not some.gradient[:2].any()
    assert not matrix(some)[:2].any()
    hessian = model_quadratic(model, nn.CrossEntropyLoss(), data, curvature="hessian")
    assert not matrix(hessian)[:2].any()


class LinearLoss(nn.Module):
    reduction = "mean"

    def forward(self, outputs, targets):
        return (outputs * targets).mean()


@pytest.mark.parametrize("loss_func", [nn.L1Loss(), LinearLoss()])
def test_a_loss_that_is_linear_in_the_outputs_has_no_ggn(loss_func):
    q = model_quadratic(tiny_cnn(), loss_func, [batch(4, 1, "mse")])
    assert q.gradient.any()
    assert not matrix(q).any()


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False).double()
            self.b = nn.Linear(3, 3, bias=False).double()
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model, X = Tied(), vector(12, 0).view(4, 3)
    q = model_quadratic(model, nn.MSELoss(), [(X, X.flip(0))])
    expected = dense_curvature(model, nn.MSELoss(), X, X.flip(0), "ggn")
    torch.testing.assert_close(matrix(q), expected, rtol=RTOL, atol=1e-14)


def test_inputs_may_be_a_mapping():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_cnn()

        def forward(self, data):
            return self.inner(data["image"])

    X, y = batch(4, 1)
    plain = model_quadratic(tiny_cnn(), nn.CrossEntropyLoss(), [(X, y)])
    wrapped = model_quadratic(Wrapped(), nn.CrossEntropyLoss(), [({"image": X}, y)])
    torch.testing.assert_close(matrix(wrapped), matrix(plain))


def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dtype=torch.float64)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_attention_has_second_derivatives(kind):
    X, y = vector(24, 0).view(2, 3, 4), torch.tensor([0, 1])
    model = transformer()
    q = model_quadratic(model, nn.CrossEntropyLoss(), [(X, y)], curvature=kind)
    v = vector(q.dimension, 1)
    v /= v.norm()

    def gradient_at(t):
        moved = transformer()
        start = nn.utils.parameters_to_vector(moved.parameters()).detach()
        nn.utils.vector_to_parameters(start + t * v, moved.parameters())
        return model_quadratic(moved, nn.CrossEntropyLoss(), [(X, y)]).gradient

    if kind == "hessian":
        difference = (gradient_at(1e-5) - gradient_at(-1e-5)) / 2e-5
        torch.testing.assert_close(q.product(v), difference, rtol=1e-5, atol=1e-8)
    else:
        assert v @ q.product(v) > 0


@pytest.mark.parametrize("enabled", [True, False])
def test_the_attention_settings_come_back(enabled):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    flash = torch.backends.cuda.flash_sdp_enabled()
    try:
        model_quadratic(tiny_cnn(), nn.CrossEntropyLoss(), [batch(4, 1)])
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        assert torch.backends.cuda.flash_sdp_enabled() == flash
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Noisy(nn.Module):
    """Everything that a mode or a random state could leak through."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_cnn()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.drop = nn.Dropout(0.5)
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise KeyError("a failure inside the model")
        out = self.drop(self.norm(self.inner(x)))
        return out + 0.1 * torch.rand(out.shape, dtype=out.dtype)


def snapshot(model):
    return (
        [module.training for module in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.grad for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    for one, two in zip(before, after, strict=True):
        if isinstance(one, dict):
            assert all(torch.equal(one[k], two[k]) for k in one)
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, two)
        else:
            assert one == two


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_left_alone(fails):
    model = Noisy()
    model.norm.eval()
    model.fails = fails
    before = snapshot(model)
    if fails:
        with pytest.raises(ModelCallError, match="a failure inside the model"):
            model_quadratic(model, nn.CrossEntropyLoss(), [batch(4, 1)])
    else:
        q = model_quadratic(model, nn.CrossEntropyLoss(), [batch(4, 1)])
        v = vector(q.dimension, 0)
        assert torch.equal(q.product(v), q.product(v))
    assert_same(before, snapshot(model))


def test_dropout_is_off():
    X, y = batch(4, 1)
    with_dropout = nn.Sequential(tiny_cnn(), nn.Dropout(0.5))
    q = model_quadratic(with_dropout, nn.CrossEntropyLoss(), [(X, y)])
    plain = model_quadratic(tiny_cnn(), nn.CrossEntropyLoss(), [(X, y)])
    torch.testing.assert_close(q.gradient, plain.gradient)


def test_products_raise_once_the_parameters_have_changed():
    model = tiny_cnn()
    q = model_quadratic(model, nn.CrossEntropyLoss(), [batch(4, 1)])
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="parameters have changed"):
        q.product(q.gradient)


def test_bad_input_is_named():
    model, loss, data = tiny_cnn(), nn.CrossEntropyLoss(), [batch(4, 1)]
    with pytest.raises(ValueError, match='reduction="mean"'):
        model_quadratic(model, nn.CrossEntropyLoss(reduction="sum"), data)
    with pytest.raises(ValueError, match="at least one mini-batch"):
        model_quadratic(model, loss, [])
    with pytest.raises(ValueError, match="at least one sample"):
        model_quadratic(model, loss, [(torch.empty(0, 1, 4, 4), torch.empty(0))])
    with pytest.raises(TypeError, match=r"data must be a pair \(X, y\)"):
        model_quadratic(model, loss, [batch(4, 1)[0]])
    with pytest.raises(TypeError, match="X must be a tensor or a mapping"):
        model_quadratic(model, loss, [("text", torch.zeros(4))])
    with pytest.raises(ValueError, match="a tensor that model lacks"):
        model_quadratic(model, loss, data, params=tiny_cnn().parameters())
    with pytest.raises(ValueError, match="hold a parameter twice"):
        model_quadratic(model, loss, data, params=[*model.parameters(), model[0].weight])
    with pytest.raises(TypeError, match="float32 or float64"):
        model_quadratic(tiny_cnn().bfloat16(), loss, data)
    with pytest.raises(RuntimeError, match="not finite: check the data"):
        model_quadratic(model, loss, [(data[0][0] * torch.nan, data[0][1])])
    with pytest.raises(ValueError, match="curvature must be one of"):
        model_quadratic(model, loss, data, curvature="newton")
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        model_quadratic(tiny_cnn().requires_grad_(False), loss, data)


def test_a_model_that_hides_its_gradient_or_returns_no_tensor_is_named():
    class Hides(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    data = [(torch.ones(2, 3), torch.tensor([0, 1]))]
    with pytest.raises(RuntimeError, match="does not depend on params"):
        model_quadratic(Hides(3, 2), nn.CrossEntropyLoss(), data)
    with pytest.raises(TypeError, match="model must return a tensor"):
        model_quadratic(Pair(3, 2), nn.CrossEntropyLoss(), data)
