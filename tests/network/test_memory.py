"""Running out of memory passes through, and nothing is remembered of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased import directional_profile
from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.inputs import explained_failure
from laplace_debiased.network.memory import is_out_of_memory


def on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def on_the_cpu() -> None:
    torch.empty(2**60)  # more than there are addresses


class Hungry(nn.Module):
    """A network that runs out of memory when it is told to; counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3).double()
        self.fail: Callable[[], None] | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.fail is not None:
            self.fail()
        return self.head(x).tanh()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
Y = torch.arange(6) % 3
COLUMNS = torch.eye(3, dtype=torch.float64).expand(6, -1, -1)
FAILURES = [on_a_gpu, on_the_cpu]


@pytest.mark.parametrize("fail", FAILURES)
def test_it_is_told_apart_from_other_failures(fail: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError) as caught:
        fail()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("fail", FAILURES)
def test_rows_are_vectorised_again_once_there_is_memory(fail: Callable[[], None]) -> None:
    model = Hungry()
    rows = RowPass(FunctionalNetwork(model, ("head.weight", "head.bias")))
    rows.rows(X, COLUMNS)  # looks at the model once
    model.calls = 0
    expected = rows.rows(X, COLUMNS)
    vectorised, model.calls, model.fail = model.calls, 0, fail
    with pytest.raises(RuntimeError) as caught:
        rows.rows(X, COLUMNS)
    assert is_out_of_memory(caught.value)
    assert model.calls == 1  # no second try, sample by sample
    model.fail, model.calls = None, 0
    assert torch.equal(rows.rows(X, COLUMNS), expected)
    assert model.calls == vectorised < len(X)


@pytest.mark.parametrize("fail", FAILURES)
def test_a_failing_model_is_not_blamed(fail: Callable[[], None]) -> None:
    with pytest.raises(RuntimeError) as caught, explained_failure(X):
        fail()
    assert not isinstance(caught.value, ModelCallError)


@pytest.mark.parametrize("fail", FAILURES)
def test_a_hessian_profile_does_not_call_it_a_failed_vectorisation(
    fail: Callable[[], None],
) -> None:
    model = Hungry()

    def first_derivatives_only(x: Tensor) -> Tensor:
        vectorised = torch._C._functorch.is_batchedtensor(x)
        model.fail = fail if vectorised else None
        return Hungry.forward(model, x)

    model.forward = first_derivatives_only  # type: ignore[method-assign]
    with pytest.raises(RuntimeError) as caught:
        directional_profile(
            model, "classification", (X[:3], Y[:3]), (X[3:], Y[3:]), k=2, matrix="hessian"
        )
    assert is_out_of_memory(caught.value)
