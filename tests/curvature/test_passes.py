"""Passes recover per-sample gradients of awkward networks, or refuse."""

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased.curvature import BackwardPass, identity_columns, operation_coverage
from laplace_debiased.errors import NumericalError
from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.tolerances import assert_exact
from tests.zoo import KINDS, Problem, problem


def jacobian_by_layers(p: Problem, byte_budget: int) -> Tensor:
    """Jacobian [m, C, P] put together from a pass's layer rows."""
    names = operation_coverage(p.model).covered
    parts = []
    for chunk in BackwardPass(p.model, names, byte_budget).chunks(p.x, identity_columns):
        blocks = {name: rows.gradients() for name, rows in chunk.blocks}
        parts.append(torch.cat([blocks[name] for name in names], -1))
    return torch.cat(parts)


@pytest.mark.parametrize("byte_budget", [1, 20_000, 2**30])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_rows_are_the_jacobian(kind: str, byte_budget: int) -> None:
    p = problem(kind, n=7)
    expected = oracles.jacobian(p.model, p.x, p.names)
    assert_exact(jacobian_by_layers(p, byte_budget), expected)


def test_float32_layer_rows_are_the_jacobian() -> None:
    p = problem("cnn", n=5, dtype=torch.float32)
    assert_exact(jacobian_by_layers(p, 1), oracles.jacobian(p.model, p.x, p.names))


def test_input_overwritten_after_the_layer_read_it_is_refused() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            out = self.second(hidden.detach())
            hidden.detach().mul_(2.0)
            return out + hidden[:, :3]

    p = problem("mlp")
    model = Overwriting().double()
    for parameter in (model.second.weight, model.first.weight, model.first.bias):
        parameter.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        DebiasedKronLaplace(model).fit(p.loader())


def test_output_that_is_no_matrix_is_refused() -> None:
    p = problem("mlp")
    model = nn.Sequential(nn.Linear(4, 3), nn.Unflatten(1, (3, 1, 1))).double()
    with pytest.raises(ValueError, match=r"shape \(batch, outputs\)"):
        DebiasedKronLaplace(model).fit(p.loader())


def test_output_that_is_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), x

    with pytest.raises(TypeError, match="must return a tensor"):
        DebiasedKronLaplace(Pair().double()).fit(problem("mlp").loader())


def test_a_forward_of_its_own_is_covered_as_what_it_does() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    p = problem("mlp")
    model = nn.Sequential(Scaled(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    q = Problem(model, p.x, p.y, p.likelihood)
    assert_exact(jacobian_by_layers(q, 2**28), oracles.jacobian(model, p.x, q.names))


@pytest.mark.parametrize("sample", [0, 1, 17])
def test_nan_data_name_the_outputs_wherever_they_are(sample: int) -> None:
    p = problem("mlp")
    p.x[sample, 1] = torch.nan
    with pytest.raises(NumericalError, match="outputs are NaN"):
        DebiasedKronLaplace(p.model).fit(p.loader())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_float32_curvature(dtype: torch.dtype) -> None:
    p = problem("mlp", dtype=torch.float32)
    expected = DebiasedKronLaplace(p.model, scheme="single")
    expected.fit(p.loader())
    half = Problem(p.model.to(dtype), p.x.to(dtype), p.y, p.likelihood)
    la = DebiasedKronLaplace(half.model, scheme="single")
    la.fit(half.loader())
    assert la.H.blocks[0].eigenvalues.dtype is torch.float32
    diagonal = expected.H.diag()
    assert torch.allclose(la.H.diag(), diagonal, rtol=0.1, atol=0.02 * float(diagonal.max()))
    assert torch.isfinite(la(half.x[:4])).all()
    assert la(half.x[:4]).float().sum(-1) == pytest.approx(1.0, abs=1e-2)
