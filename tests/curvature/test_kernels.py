"""The kernels against plain einsums, in every order of rotation that they choose between."""

import warnings

import pytest
import torch
from torch import Tensor, vmap

from laplace_debiased.curvature import kernels
from laplace_debiased.curvature.rows.rotated import weight_curvature
from tests.tolerances import assert_exact

# (T, D_in, R, D_out): both rotations before the sum over positions, one of them, neither; T = 1.
SHAPES = [(2, 4, 3, 5), (9, 10, 2, 3), (7, 2, 4, 3), (30, 3, 2, 4), (1, 4, 3, 5)]


def arrays(shape: tuple[int, int, int, int], m: int = 6) -> tuple[Tensor, ...]:
    positions, width, columns, outs = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    u_b, u_a = torch.linalg.qr(normal(outs, outs)).Q, torch.linalg.qr(normal(width, width)).Q
    return normal(m, positions, width), normal(m, columns, positions, outs), u_b, u_a, normal(m)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotated_gradients(shape: tuple[int, int, int, int]) -> None:
    a, g, u_b, u_a, _ = arrays(shape)
    expected = torch.einsum("nrtd,dk,nte,el->nrkl", g, u_b, a, u_a)
    assert_exact(kernels.rotated_gradients(a, g, u_b, u_a), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_curvature_sums_over_positions_before_it_squares(
    shape: tuple[int, int, int, int],
) -> None:
    a, g, u_b, u_a, c = arrays(shape)
    rows = torch.einsum("nrtd,nte->nrde", g, a)
    expected = torch.einsum("n,nrij->ij", c, (u_b.T @ rows @ u_a).square())
    assert_exact(weight_curvature(a, g, u_b, u_a, c), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_curvature_is_vectorised_over_groups_without_a_fallback(
    shape: tuple[int, int, int, int],
) -> None:
    *groups, c = (torch.stack([one, one + 1]) for one in arrays(shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = vmap(weight_curvature, (0, 0, 0, 0, None))(*groups, c[0])
    for index, table in enumerate(actual):
        assert_exact(table, weight_curvature(*(one[index] for one in groups), c[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_input_factors(shape: tuple[int, int, int, int], weighted: bool) -> None:
    a, _, _, _, c = arrays(shape)
    weights = c.abs() if weighted else torch.ones_like(c)
    given = weights if weighted else None
    inputs = torch.einsum("n,nte,ntf->ef", weights, a, a) / a.shape[1]
    assert_exact(kernels.input_covariance(a, given), inputs)
