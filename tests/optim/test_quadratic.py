"""The damped quadratic against its formula."""

import pytest
import torch

from laplace_debiased.optim import Quadratic
from tests.optim.problems import RTOL, spd, vector


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_product_residual_and_value_are_those_of_the_damped_matrix(damping):
    H, g, x = spd(6, 0), vector(6, 1), vector(6, 2)
    q = Quadratic(H, g, damping)
    damped = H + damping * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(q.product(x), damped @ x, rtol=RTOL, atol=0)
    torch.testing.assert_close(q.residual(x), g + damped @ x, rtol=RTOL, atol=0)
    assert q.value_from_residual(x, q.residual(x)) == pytest.approx(
        (g @ x + 0.5 * x @ damped @ x).item(), rel=RTOL
    )
    assert q.dimension == 6


def test_the_residual_is_the_derivative_of_the_value():
    H, g, x = spd(6, 0), vector(6, 1), vector(6, 2).requires_grad_()
    (slope,) = torch.autograd.grad(g @ x + 0.5 * x @ H @ x + 0.1 * x @ x, x)
    q = Quadratic(H, g, 0.2)
    torch.testing.assert_close(q.residual(x.detach()), slope, rtol=RTOL, atol=0)


def test_the_image_comes_back_in_the_precision_of_the_vector():
    q = Quadratic(spd(6, 0).numpy(), vector(6, 1).float())
    assert q.product(q.gradient).dtype == torch.float32
