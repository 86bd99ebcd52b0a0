"""`EigenBlock` and `EigenKron` against dense matrices."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laplace_debiased.errors import NumericalError
from laplace_debiased.operators import EigenBlock, EigenKron
from tests.operators.oracles import (
    EXPONENTS,
    assert_close,
    blocks,
    dense_kron,
    kron_operator,
    matrix_power,
    normal,
    orthogonal,
    table,
)


def scaled_pair(h: float = 1.7) -> tuple[EigenKron, Tensor]:
    members, deltas = blocks(), torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    return h * EigenKron(members) + deltas, dense_kron(members, deltas, h)


def test_dense_matrix_is_kronecker_product_of_bases_with_full_table():
    operator, dense = scaled_pair()
    assert_close(operator.to_matrix(), dense)
    assert operator.n_params == len(dense)
    assert len(operator) == 7


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_bmm_is_dense_matrix_power_and_keeps_the_shape(exponent):
    operator, dense = scaled_pair()
    for shape in ((), (5,), (1,), (3, 2), (1, 1), (1, 2), (3, 1), (0,), (0, 2)):
        W = normal(*shape, operator.n_params, seed=1)
        assert_close(operator.bmm(W, exponent), W @ matrix_power(dense, exponent))


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_diagonal_and_matrix_are_those_of_the_dense_power(exponent):
    operator, dense = scaled_pair()
    power = matrix_power(dense, exponent)
    assert_close(operator.diag(exponent), power.diagonal())
    assert_close(operator.to_matrix(exponent), power)


def test_logdet_is_that_of_the_dense_matrix():
    operator, dense = scaled_pair()
    assert_close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)


@pytest.mark.parametrize(("n", "n_outputs"), [(3, 2), (1, 1), (0, 2)])
def test_inverse_square_form_is_dense_functional_variance(n, n_outputs):
    operator, dense = scaled_pair()
    J = normal(n, n_outputs, operator.n_params, seed=2)
    expected = torch.einsum("ncp,pq,nkq->nck", J, torch.linalg.inv(dense), J)
    assert_close(operator.inv_square_form(J), expected)


def test_inverse_square_form_in_float32_is_positive_at_extreme_conditioning():
    n = 40
    stiff = torch.logspace(-2, 8, n * n).reshape(n, n)
    block = EigenBlock(orthogonal(n, 0).float(), orthogonal(n, 1).float(), stiff)
    operator = EigenKron((block,), torch.tensor(1e-3))
    top = block.from_eigenbasis(torch.eye(n * n)[-3:]).unsqueeze(0)
    assert torch.linalg.eigvalsh(operator.inv_square_form(top)).min() > 0


def test_white_noise_through_the_inverse_root_has_the_posterior_covariance():
    operator, dense = scaled_pair()
    root = operator.bmm(torch.eye(operator.n_params, dtype=torch.float64), exponent=-0.5)
    assert_close(root.T @ root, torch.linalg.inv(dense))


def test_basis_coordinates_are_a_rotation_in_row_major_order():
    block = blocks()[0]
    W = normal(3, 4, seed=3)
    coordinates = block.to_eigenbasis(W.flatten())
    assert_close(coordinates, (block.output_basis.T @ W @ block.input_basis).flatten())
    assert_close(block.from_eigenbasis(coordinates), W.flatten())


def test_identity_basis_is_never_formed():
    # A formed identity would be 10^5 x 10^5: 80 GB.
    n_embeddings = 100_000
    block = EigenBlock(None, orthogonal(2, 0), torch.ones(n_embeddings, 2, dtype=torch.float64))
    operator = EigenKron((block,), torch.tensor(1.0))
    v = normal(operator.n_params, seed=1)
    assert_close(operator.bmm(v), v / 2)
    assert_close(operator.diag(), torch.full_like(v, 2.0))
    assert operator.eigenvectors[0][0] is None


def test_product_scales_eigenvalues_and_leaves_deltas():
    operator = kron_operator()
    product = operator * 3.0
    assert_close(product.deltas, operator.deltas)
    for before, after in zip(operator.eigenvalues, product.eigenvalues, strict=True):
        assert_close(after[0], 3.0 * before[0])


@pytest.mark.parametrize(
    "scalar", [2, 2.0, np.float64(2), np.float32(2), torch.tensor(2), torch.tensor([2.0])]
)
def test_any_scalar_multiplies_from_either_side(scalar):
    operator, expected = kron_operator(), (kron_operator() * 2.0).to_matrix()
    assert_close((operator * scalar).to_matrix(), expected)
    assert_close((scalar * operator).to_matrix(), expected)


@pytest.mark.parametrize("shape", [(), (1,), (7,)])
def test_deltas_of_any_form_add_from_either_side(shape):
    operator = kron_operator()
    deltas = torch.full(shape, 0.25, dtype=torch.float64)
    assert_close((operator + deltas).deltas, operator.deltas + 0.25)
    assert_close((deltas + operator).deltas, operator.deltas + 0.25)


def test_one_block_of_one_parameter_is_scalar_arithmetic():
    block = EigenBlock(
        -torch.ones(1, 1, dtype=torch.float64), None, torch.tensor([3.0], dtype=torch.float64)
    )
    operator = EigenKron((block,)) * 2.0 + torch.tensor(1.0)
    seven, one = torch.tensor([7.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert_close(operator.bmm(one), 1 / seven)
    assert_close(operator.bmm(one, 0.5), seven.sqrt())
    assert_close(operator.logdet(), seven.log()[0])
    assert_close(operator.inv_square_form(one.reshape(1, 1, 1)), 1 / seven.reshape(1, 1, 1))


# --- metamorphic -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.one_of(st.none(), st.integers(1, 4))),
        min_size=1,
        max_size=4,
    ),
    n=st.integers(0, 3),
    exponent=st.floats(-2, 2),
    h=st.floats(0, 10),
    seed=st.integers(0, 10_000),
)
def test_random_shapes_agree_with_dense_matrices(shapes, n, exponent, h, seed):
    members = tuple(
        EigenBlock(
            orthogonal(d_out, seed + i),
            None if d_in is None else orthogonal(d_in, seed + 100 + i),
            table(*((d_out,) if d_in is None else (d_out, d_in)), seed=seed + 200 + i),
        )
        for i, (d_out, d_in) in enumerate(shapes)
    )
    deltas = 0.1 + torch.arange(len(members), dtype=torch.float64)
    operator, dense = EigenKron(members, deltas) * h, dense_kron(members, deltas, h)
    W = normal(n, operator.n_params, seed=seed)
    assert_close(operator.bmm(W, exponent), W @ matrix_power(dense, exponent), rtol=1e-7, atol=1e-8)
    assert_close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)


@settings(max_examples=25, deadline=None)
@given(first=st.floats(-2, 2), second=st.floats(-2, 2))
def test_exponents_add_up(first, second):
    operator, W = kron_operator(), normal(2, kron_operator().n_params, seed=4)
    assert_close(operator.bmm(operator.bmm(W, first), second), operator.bmm(W, first + second))


def test_results_do_not_depend_on_how_vectors_are_batched():
    operator = kron_operator()
    W = normal(6, operator.n_params, seed=5)
    assert_close(torch.cat([operator.bmm(part) for part in W.split(2)]), operator.bmm(W))
    assert_close(operator.bmm(W.reshape(3, 2, -1)).reshape(6, -1), operator.bmm(W))
    assert_close(operator.bmm(W[0]), operator.bmm(W)[0])


def test_reordering_blocks_reorders_parameters():
    operator = kron_operator()
    backwards = EigenKron(operator.blocks[::-1], operator.deltas.flip(0))
    sizes = [block.n_params for block in operator.blocks]
    W = normal(operator.n_params, seed=6)
    flipped = torch.cat(W.split(sizes)[::-1])
    assert_close(torch.cat(operator.bmm(W).split(sizes)[::-1]), backwards.bmm(flipped))
    assert_close(operator.logdet(), backwards.logdet())


def test_scaling_curvature_and_prior_together_scales_the_inverse():
    operator = kron_operator()
    W = normal(operator.n_params, seed=7)
    scaled = operator * 4.0 + 3.0 * operator.deltas
    assert_close(scaled.bmm(W), operator.bmm(W) / 4)
    shift = operator.n_params * torch.log(torch.tensor(4.0, dtype=torch.float64))
    assert_close(scaled.logdet(), operator.logdet() + shift)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_deltas", [(), (1,), (7,)])
def test_gradients_reach_deltas_and_scalar(n_deltas):
    members = blocks()
    W = normal(2, 2, kron_operator().n_params, seed=8)

    def quantities(deltas: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        operator = EigenKron(members) * h + deltas
        return (
            operator.logdet(),
            operator.bmm(W),
            operator.bmm(W, 0.5),
            operator.inv_square_form(W),
            operator.diag(-1),
            operator.to_matrix(2),
        )

    deltas = torch.full(n_deltas, 0.7, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quantities, (deltas, h), fast_mode=True)


def test_gradient_is_finite_where_eigenvalues_and_scalar_are_zero():
    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (EigenKron(blocks()) * h + torch.tensor(1.0)).logdet().backward()
    assert_close(h.grad, sum(table.sum() for (table,) in EigenKron(blocks()).eigenvalues))


# --- a value -----------------------------------------------------------------------------------


def test_no_method_changes_the_operator_or_its_inputs():
    operator = kron_operator()
    before = copy.deepcopy(operator)
    W = normal(2, 2, operator.n_params, seed=9)
    W_before, deltas = W.clone(), torch.ones(7, dtype=torch.float64)
    derived = (operator * 5.0 + deltas).detach()
    for exponent in EXPONENTS:
        operator.bmm(W, exponent)
    operator.inv_square_form(W)
    assert derived.dtype == operator.dtype
    assert torch.equal(W, W_before)
    assert torch.equal(deltas, torch.ones(7, dtype=torch.float64))
    assert torch.equal(operator.to_matrix(), before.to_matrix())
    with pytest.raises(AttributeError):
        operator.deltas = deltas


def test_detach_returns_a_value_without_graph_and_leaves_the_first():
    deltas = torch.ones(7, dtype=torch.float64, requires_grad=True)
    operator = EigenKron(blocks(), deltas)
    assert not operator.detach().logdet().requires_grad
    assert operator.logdet().requires_grad


def test_float32_agrees_with_float64_to_its_precision():
    operator = kron_operator()
    W = normal(3, operator.n_params, seed=10)
    single = EigenKron(
        tuple(
            EigenBlock(*(part if part is None else part.float() for part in parts))
            for parts in ((b.output_basis, b.input_basis, b.eigenvalues) for b in operator.blocks)
        ),
        operator.deltas.float(),
    )
    assert single.bmm(W.float()).dtype == torch.float32
    assert_close(single.bmm(W.float()).double(), operator.bmm(W), rtol=1e-5, atol=1e-5)
    assert single.logdet().dtype == torch.float32


def test_repr_gives_sizes_rather_than_entries():
    assert repr(kron_operator()) == "EigenKron(7 blocks, 31 parameters, torch.float64, cpu)"
    assert "input_basis=identity" in repr(blocks()[2])
    assert "identity" not in repr(blocks()[1])


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EigenKron(blocks(), torch.ones(2)), ValueError, r"one per block \[7\]"),
        (lambda: kron_operator() + torch.ones(7, 1), ValueError, "deltas must be"),
        (lambda: kron_operator() + 1.0, ValueError, r"deltas must be a torch\.Tensor"),
        (lambda: kron_operator() * torch.ones(7), ValueError, "scalar must be one real number"),
        (lambda: kron_operator() * "2", ValueError, "scalar must be one real number"),
        (lambda: kron_operator() * 1j, ValueError, "scalar must be one real number"),
        (lambda: kron_operator() * float("inf"), NumericalError, "block 0 .* overflows"),
        (lambda: 1e308 * (1e308 * kron_operator()), NumericalError, "Raise sigma_noise"),
        (lambda: kron_operator().bmm(torch.ones(30)), ValueError, "W must have 31 entries"),
        (
            lambda: kron_operator().bmm(torch.ones(1, 1, 1, 31, dtype=torch.float64)),
            ValueError,
            "W must be",
        ),
        (lambda: kron_operator().bmm(torch.ones(31)), TypeError, "W must have the dtype"),
        (
            lambda: kron_operator().bmm(normal(31, seed=0), float("nan")),
            ValueError,
            "exponent must be finite",
        ),
        (
            lambda: kron_operator().inv_square_form(normal(2, 31, seed=0)),
            ValueError,
            r"W must be \[n, C, P\]",
        ),
    ],
)
def test_bad_use_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("delta", [0.0, -0.1])
def test_non_positive_eigenvalue_is_refused_with_its_block(delta):
    deltas = torch.ones(7, dtype=torch.float64)
    deltas[2] = delta
    operator, W = EigenKron(blocks(), deltas), normal(1, 1, 31, seed=0)
    for use in (
        operator.logdet,
        lambda: operator.bmm(W),
        lambda: operator.bmm(W, -0.5),
        lambda: operator.inv_square_form(W),
        lambda: operator.diag(-1),
        lambda: operator.to_matrix(-1),
    ):
        with pytest.raises(ValueError, match=r"block 2 \(of 7\)"):
            use()
    assert_close(operator.bmm(W, 1), W @ operator.to_matrix())
    if delta < 0:
        with pytest.raises(ValueError, match=r"exponent 0\.5 needs non-negative"):
            operator.bmm(W, 0.5)
    else:
        assert_close(operator.bmm(W, 0.5), W @ operator.to_matrix(0.5))
