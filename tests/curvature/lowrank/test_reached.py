"""Derivatives that torch would lose or get wrong in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.diagnostics import directional_profile
from laplace_debiased.errors import ModelCallError
from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.optim import model_quadratic
from tests.tolerances import relative_error

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(12, 4, generator=G, dtype=torch.float64), torch.arange(12) % 3


class Times(torch.autograd.Function):
    """x Wᵀ in a function of its own, which torch functions do not see inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Times.apply(x, self.weight).tanh())


class Distances(nn.Module):
    """torch's own rule for a vectorised backward pass of cdist gives other numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.centres)


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return kind().double()


def plain_rows(model: nn.Module) -> Tensor:
    """J [n, C, P] by one ordinary backward pass per sample and output."""
    parameters = list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters, retain_graph=True)])
        for x in X
        for f in model(x[None])[0]
    ]
    return torch.stack(rows).reshape(len(X), 3, -1)


def test_a_parameter_that_a_function_of_its_own_reads_is_named() -> None:
    model = network(Custom)
    la = DebiasedLaplace(model, hessian_structure="lowrank")
    with pytest.raises(ModelCallError, match=r"'weight'.*autograd\.Function"):
        la.fit([(X, Y)], n_data=12)
    with pytest.raises(ModelCallError, match=r"'weight'.*autograd\.Function"):
        directional_profile(model, "classification", (X[:6], Y[:6]), (X[6:], Y[6:]), k=2)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_it_is_no_obstacle() -> None:
    model = network(Custom)
    model.weight.requires_grad_(False)
    la = DebiasedLaplace(model, hessian_structure="lowrank")
    la.fit([(X, Y)], n_data=12)
    assert bool(torch.isfinite(la(X)).all())


def test_rows_that_torch_vectorises_wrongly_are_walked_one_by_one() -> None:
    model = network(Distances)
    row_pass = RowPass(FunctionalNetwork(model, ("centres",)))
    columns = torch.eye(3, dtype=X.dtype).expand(len(X), 3, 3)
    assert relative_error(row_pass.rows(X, columns), plain_rows(model)) < 1e-12
    assert relative_error(row_pass.rows(X, columns), plain_rows(model)) < 1e-12


def test_sparse_gradients_are_rows_as_others_are() -> None:
    torch.manual_seed(2)
    tokens = torch.randint(0, 9, (12, 3))
    sparse = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3))
    dense = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    dense.load_state_dict(sparse.state_dict())
    found = []
    for model in (sparse, dense):
        la = DebiasedLaplace(model, hessian_structure="lowrank")
        la.fit([(tokens, Y)], n_data=12)
        found.append(la(tokens))
    assert relative_error(*found) < 1e-5


class Counted(nn.Module):
    """A table, whose gradient torch divides by how often a batch reads each row."""

    def __init__(self, *, scaled: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, scale_grad_by_freq=scaled)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens).sum(1).tanh())


class CountedBags(Counted):
    """The same in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(5, 4, scale_grad_by_freq=True, mode="sum")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens).tanh())


TOKENS = torch.randint(0, 5, (12, 6), generator=G)


@pytest.mark.parametrize("kind", [Counted, CountedBags])
def test_rows_of_a_table_are_jacobians_however_often_it_is_read(kind: type[Counted]) -> None:
    model = network(kind)
    one_hot = nn.functional.one_hot(TOKENS, 5).double().sum(1)
    expected = torch.func.jacrev(lambda table: model.head((one_hot @ table).tanh()))(
        model.words.weight.detach()
    )
    row_pass = RowPass(FunctionalNetwork(model, ("words.weight",)))
    columns = torch.eye(3, dtype=X.dtype).expand(len(TOKENS), 3, 3)
    assert relative_error(row_pass.rows(TOKENS, columns), expected.flatten(2)) < 1e-12


def test_frequencies_of_tokens_change_no_number() -> None:
    found = []
    for scaled in (True, False):
        torch.manual_seed(1)
        model = Counted(scaled=scaled).double()
        la = DebiasedLaplace(model, hessian_structure="lowrank")
        la.fit([(TOKENS, Y)], n_data=12)
        profile = directional_profile(
            model, "classification", (TOKENS[:6], Y[:6]), (TOKENS[6:], Y[6:]), k=2
        )
        quadratic = model_quadratic(model, nn.CrossEntropyLoss(), [(TOKENS, Y)])
        direction = torch.ones_like(quadratic.gradient)
        numbers = [la(TOKENS).flatten(), la.posterior_precision[0][1], quadratic.gradient]
        own = profile.own
        numbers += [quadratic.product(direction), own.slope.mean, own.curvature.mean]
        found.append(torch.cat(numbers))
    assert relative_error(*found) < 1e-9


class HalfBelow(nn.Module):
    """A frozen network in bfloat16 under a head in float32."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()) for _ in range(12)]
        self.below = nn.Sequential(*layers).to(torch.bfloat16).requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.below(x).float())


def test_rounding_of_half_precision_below_is_no_lost_derivative() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        la = DebiasedLaplace(HalfBelow(), hessian_structure="lowrank")
        la.fit([(X.bfloat16(), Y)], n_data=12)
        assert bool(torch.isfinite(la(X.bfloat16())).all())
