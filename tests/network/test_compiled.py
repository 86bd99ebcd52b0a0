"""Compiled models are read as they were written, and stay compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.network.modes import eager_execution
from tests.tolerances import assert_same
from tests.untouched import untouched
from tests.zoo import problem

P = problem("mlp", dtype=torch.float32)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    """The compiler stops after some graphs of the same code, whichever model they are of."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counting:
    """A compiler that changes nothing and counts the graphs that it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return graph.forward


class Holding(nn.Module):
    """A compiled network inside of one that is not."""

    def __init__(self, inner: nn.Module, backend: Counting) -> None:
        super().__init__()
        self.inner = torch.compile(inner, backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


class Doubled(Holding):
    """The same without a compiler."""

    def __init__(self, inner: nn.Module) -> None:
        nn.Module.__init__(self)
        self.inner = inner


def in_place(model: nn.Module, backend: Counting) -> nn.Module:
    model.compile(backend=backend)
    return model


WAYS = {
    "torch.compile": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile": in_place,
    "inside": Holding,
}


@pytest.mark.parametrize("structure", ["kron", "lowrank"])
@pytest.mark.parametrize("way", WAYS)
def test_compiled_model_has_the_posterior_of_the_plain_one(way: str, structure: str) -> None:
    plain = problem("mlp", dtype=torch.float32).model
    compiled, backend = problem("mlp", dtype=torch.float32).model, Counting()
    compiled.load_state_dict(plain.state_dict())
    model = WAYS[way](compiled, backend)
    model.eval()(P.x[:5])  # compiled before there are hooks
    graphs = backend.graphs
    assert graphs > 0
    reference = Doubled(plain) if way == "inside" else plain
    expected = DebiasedLaplace(reference, hessian_structure=structure)
    la = DebiasedLaplace(model, hessian_structure=structure, strict=True)
    expected.fit(P.loader())
    with untouched(model):
        la.fit(P.loader())
        probs = la(P.x)
        g = torch.Generator().manual_seed(0)
        la(P.x, pred_type="nn", link_approx="mc", n_samples=2, generator=g)
    assert backend.graphs == graphs, "a fit is no reason to compile anew"
    assert_same(probs, expected(P.x))
    with torch.no_grad():
        model(P.x[:5])
    assert backend.graphs > graphs, "the model is still compiled where it has to be"


def test_the_users_own_stance_is_restored_by_the_last_to_leave() -> None:
    backend = Counting()
    model = torch.compile(nn.Linear(4, 3), backend=backend)
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with eager_execution():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=stay)
    with eager_execution():
        other.start()
        assert inside.wait(10)
    model(P.x)
    assert backend.graphs == 0, "the other thread is inside still"
    leave.set()
    other.join()
    with torch.compiler.set_stance("force_eager"):
        with pytest.raises(KeyError), eager_execution():
            raise KeyError
        model(P.x)
    assert backend.graphs == 0, "what the user chose holds"
    model(P.x)
    assert backend.graphs == 1
