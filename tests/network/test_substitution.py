"""A model computes with stand-ins, whatever way its code takes to its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from laplace_debiased.network.substitution import call_with, substituted
from tests.untouched import untouched

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    one: Tensor
    two: Tensor


class Product(torch.autograd.Function):
    """A function with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None


class Reads(nn.Module):
    """One weight, read in some way."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x, self.weight)


class Tied(nn.Module):
    """Two names for one parameter, and two for one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.again = self.first
        self.plain = [self.second]

    def forward(self, x: Tensor) -> Tensor:
        return self.plain[0](self.again(self.second(self.first(x)).tanh()).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(0))[0].squeeze(0)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 4)), layer, nn.Flatten())


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transposed": lambda x, w: x @ w.T,
    "data": lambda x, w: x @ w.data,
    "detached and copied": lambda x, w: x @ w.detach().clone(),
    "by rows": lambda x, w: torch.stack([x @ row for row in w], -1),
    "as a scalar": lambda x, w: x * float(w[0, 0]) + w.sum().item(),
    "in a list": lambda x, w: torch.cat([x @ w, w[:1].expand(5, 4)], dim=1),
    "in a named tuple": lambda x, w: torch.cat(Pair(x, w), dim=0),
    "by keyword": lambda x, w: torch.nn.functional.linear(input=x, weight=w),
    "as an index": lambda x, w: x[:, w.argmax(0)],
    "in einsum": lambda x, w: torch.einsum("ni,ij->nj", x, w),
    "in a function of its own": Product.apply,  # type: ignore[dict-item]
    "by address": lambda x, w: x * float(w.data_ptr() != 0),
    "over rows by vmap": lambda x, w: torch.vmap(lambda row: row @ w)(x),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "lstm": Recurrent,
    "encoder": encoder,
    "parametrised": lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
    **{name: partial(Reads, read) for name, read in READS.items()},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[request.param]().double().eval()


def moved(model: nn.Module) -> dict[str, Tensor]:
    entries = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach() + 0.3 for name, value in entries if value.is_floating_point()}


def test_outputs_are_those_of_a_model_that_has_the_other_weights(model: nn.Module) -> None:
    other, values = copy.deepcopy(model), moved(model)
    with torch.no_grad():
        for name, entry in (*other.named_parameters(), *other.named_buffers()):
            if name in values:
                entry.copy_(values[name])
        with untouched(model):
            actual = call_with(model, values, (X,))
        expected = other(X)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(call_with(model, {}, (X,)), model(X))


def test_the_model_holds_its_own_tensors_while_it_runs() -> None:
    held: list[Any] = []

    def read(x: Tensor, w: Tensor) -> Tensor:
        held.append((model._parameters["weight"], w))
        return x @ w

    model = Reads(read).double()
    call_with(model, moved(model), (X,))
    assert held[0][0] is model.weight
    assert held[0][1] is model.weight


def test_what_a_model_writes_to_its_weight_goes_to_the_stand_in() -> None:
    model = Reads(lambda x, w: x @ w.data.mul_(2.0)).double()
    values = moved(model)
    start = values["weight"].clone()
    with untouched(model):
        assert torch.equal(call_with(model, values, (X,)), X @ (2 * start))
    assert torch.equal(values["weight"], 2 * start)


def test_gradients_reach_the_stand_in_and_not_the_parameter() -> None:
    layer = nn.Linear(4, 3).double().requires_grad_(False)
    alias = layer.weight.detach().requires_grad_()
    with untouched(layer), substituted({layer.weight: alias}):
        outputs = layer(X).sum()
    (gradient,) = torch.autograd.grad(outputs, alias)
    torch.testing.assert_close(gradient, X.sum(0).expand(3, 4))


def test_a_block_ends_for_its_own_thread_and_when_it_raises() -> None:
    layer = nn.Linear(4, 3).double()
    before, zeros = layer(X), torch.zeros_like(layer.weight)
    with pytest.raises(LookupError), substituted({layer.weight: zeros}):
        raise LookupError
    with substituted({layer.weight: zeros}), ThreadPoolExecutor(1) as pool:
        assert torch.equal(layer(X), layer.bias.expand(5, 3))
        assert torch.equal(pool.submit(layer, X).result(), before)
    assert torch.equal(layer(X), before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_module_is_refused_by_name() -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"'weight'.*scripted"):
        call_with(model, {"0.weight": torch.zeros(4, 4)}, (X.float(),))
    with torch.no_grad():
        outputs = call_with(model, {"1.weight": torch.zeros(2, 4)}, (X.float(),))
    assert torch.equal(outputs, model[1].bias.expand(5, 2))


def test_a_mode_that_comes_back_after_its_block_is_idle_until_the_next_one_removes_it() -> None:
    layer = nn.Linear(4, 3).double()
    expected, zeros = layer(X), torch.zeros_like(layer.weight)
    modes = torch.overrides._get_current_function_mode_stack
    with substituted({layer.weight: zeros}):
        (late,) = modes()
    torch.overrides._push_mode(late)
    try:
        assert torch.equal(layer(X), expected)
        with substituted({layer.weight: zeros}):
            assert len(modes()) == 1
            torch.overrides._pop_mode()  # as a torch function does that is interrupted
    finally:
        assert not modes()
    assert torch.equal(layer(X), expected)
