"""Models that cast on their own, by ``torch.autocast`` in their forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laplace_debiased.factory import DebiasedLaplace
from laplace_debiased.network.precision import exact_arithmetic
from tests.tolerances import relative_error
from tests.untouched import untouched
from tests.zoo import Problem, problem

POSTERIORS = [(s, h) for s in ("all", "last_layer") for h in ("kron", "lowrank")]


class Casting(nn.Module):
    """The same network with half-precision products and outputs."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return self.inner(x)


def normalised_cnn() -> Problem:
    """Small images, with BatchNorm and a grouped convolution between the layers."""
    p = problem("cnn", dtype=torch.float32)
    body = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return Problem(body.eval(), p.x, p.y, p.likelihood)


CASES = {"mlp": lambda: problem("mlp", dtype=torch.float32), "cnn": normalised_cnn}


def fitted(p: Problem, model: nn.Module, subset: str, structure: str, **options):
    la = DebiasedLaplace(model, p.likelihood, subset, structure, **options)
    la.fit(p.loader())
    return la


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("subset", "structure"), POSTERIORS)
def test_posterior_is_near_that_of_the_network_without_casts(
    subset: str, structure: str, cast: torch.dtype, name: str
) -> None:
    p = CASES[name]()
    expected, model = fitted(p, p.model, subset, structure), Casting(p.model, cast)
    with untouched(model):
        la = fitted(p, model, subset, structure)
        probs = la(p.x)
    assert la.coverage.gaps == {}
    assert la.coverage.n_covered == expected.coverage.n_covered
    assert probs.dtype is la.mean.dtype is torch.float32
    assert bool(torch.isfinite(probs).all())
    assert relative_error(probs, expected(p.x)) < 2e-2
    assert float(la.log_marginal_likelihood()) == pytest.approx(
        float(expected.log_marginal_likelihood()), rel=2e-2
    )


def test_products_without_rows_are_near_those_of_the_network_without_casts() -> None:
    p = problem("mlp", dtype=torch.float32)
    options = {"rank": 3, "byte_budget": 1000}  # too few bytes for the rows: Lanczos
    expected = fitted(p, p.model, "all", "lowrank", **options)
    la = fitted(p, Casting(p.model), "all", "lowrank", **options)
    assert relative_error(la.H[1], expected.H[1]) < 2e-2
    assert relative_error(la(p.x), expected(p.x)) < 2e-2


def test_weights_that_change_are_cast_anew_inside_of_our_own_arithmetic() -> None:
    model, x = Casting(nn.Linear(4, 3)), torch.randn(2, 4)
    with exact_arithmetic(torch.device("cpu")):
        before = model(x).detach()
        model.inner.weight.data = 2 * model.inner.weight.data
        assert not torch.equal(model(x), before)
