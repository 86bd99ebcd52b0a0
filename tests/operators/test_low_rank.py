"""`LowRank` against dense matrices."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from laplace_debiased.operators import LowRank
from tests.operators.oracles import assert_close, normal, orthogonal, table

N_PARAMS, RANK, LAYERS = 9, 4, (2, 4, 3)
PRIORS = {
    "number": 0.7,
    "scalar": torch.tensor(0.7, dtype=torch.float64),
    "one": torch.tensor([0.7], dtype=torch.float64),
    "per_layer": torch.tensor([0.2, 1.5, 4.0], dtype=torch.float64),
    "diagonal": torch.linspace(0.1, 3.0, N_PARAMS, dtype=torch.float64),
}
BASES = {
    "orthonormal": orthogonal(N_PARAMS, 0)[:, :RANK],
    "oblique": normal(N_PARAMS, RANK, seed=1),
    "dependent": normal(N_PARAMS, 2, seed=2).repeat(1, 2),
    "wide": normal(N_PARAMS, 12, seed=3),
    "empty": torch.empty(N_PARAMS, 0, dtype=torch.float64),
}
every_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
every_basis = pytest.mark.parametrize("basis", BASES.values(), ids=BASES)


def prior_diagonal(prior: float | Tensor) -> Tensor:
    prior = torch.as_tensor(prior, dtype=torch.float64).reshape(-1)
    if len(prior) == len(LAYERS):
        return torch.cat([d.repeat(n) for d, n in zip(prior, LAYERS, strict=True)])
    return prior.expand(N_PARAMS)


def low_rank_and_dense(basis: Tensor, prior: float | Tensor, h: float = 1.6):
    eigenvalues = table(basis.shape[1], seed=4)
    operator = LowRank(basis, eigenvalues, prior, LAYERS).scaled(h)
    dense = torch.zeros(N_PARAMS, N_PARAMS, dtype=torch.float64)
    for column, value in zip(basis.T, eigenvalues, strict=True):
        dense += h * value * torch.outer(column, column)
    return operator, dense + torch.diag(prior_diagonal(prior))


@every_prior
@every_basis
class TestAgainstDense:
    def test_matrix(self, basis, prior):
        operator, dense = low_rank_and_dense(basis, prior)
        assert_close(operator.to_matrix(), dense)

    def test_logdet(self, basis, prior):
        operator, dense = low_rank_and_dense(basis, prior)
        assert_close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)

    def test_norms(self, basis, prior):
        operator, dense = low_rank_and_dense(basis, prior)
        for shape in ((), (3,), (1,), (0,), (2, 3)):
            v = normal(*shape, N_PARAMS, seed=5)
            assert_close(operator.square_norm(v), torch.einsum("...p,pq,...q->...", v, dense, v))

    def test_sampling_map_squares_to_the_covariance(self, basis, prior):
        operator, dense = low_rank_and_dense(basis, prior)
        S = operator.sqrt_solve(torch.eye(N_PARAMS, dtype=torch.float64)).T
        assert_close(S @ S.T, torch.linalg.inv(dense))
        assert operator.sqrt_solve(normal(2, 3, N_PARAMS, seed=6)).shape == (2, 3, N_PARAMS)

    def test_functional_variance_from_jacobians(self, basis, prior):
        operator, dense = low_rank_and_dense(basis, prior)
        for n in (0, 1, 3):
            J = normal(n, 2, N_PARAMS, seed=7)
            expected = torch.einsum("ncp,pq,nkq->nck", J, torch.linalg.inv(dense), J)
            assert_close(operator.inv_square_form(J), expected)


def test_empty_basis_leaves_the_prior():
    operator = LowRank(BASES["empty"], torch.empty(0, dtype=torch.float64), 2.0)
    ones = torch.ones(N_PARAMS, dtype=torch.float64)
    assert_close(operator.sqrt_solve(ones), prior_diagonal(0.5).sqrt())


def test_one_parameter_is_scalar_arithmetic():
    operator = LowRank(torch.ones(1, 1), torch.tensor([3.0]), 1.0).scaled(2.0)
    assert_close(operator.sqrt_solve(torch.ones(1)), torch.tensor([7**-0.5]), rtol=1e-6)
    assert_close(operator.logdet(), torch.tensor(7.0).log(), rtol=1e-6)


# --- metamorphic -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    rank=st.integers(0, 6),
    h=st.floats(0, 100),
    form=st.sampled_from(["scalar", "layers", "diagonal"]),
    seed=st.integers(0, 10_000),
)
def test_random_shapes_agree_with_dense_matrices(sizes, rank, h, form, seed):
    n_params = sum(sizes)
    length = {"scalar": 1, "layers": len(sizes), "diagonal": n_params}[form]
    prior = 0.1 + torch.arange(length, dtype=torch.float64)
    basis, eigenvalues = normal(n_params, rank, seed=seed), table(rank, seed=seed + 1)
    operator = LowRank(basis, eigenvalues, prior, tuple(sizes), scale=h)
    repeats = {"scalar": [n_params], "layers": sizes, "diagonal": [1] * n_params}[form]
    diagonal = torch.cat([d.repeat(n) for d, n in zip(prior, repeats, strict=True)])
    dense = h * (basis * eigenvalues) @ basis.T + torch.diag(diagonal)
    v = normal(2, n_params, seed=seed + 2)
    expected = v @ torch.linalg.solve(dense, v.T)
    assert_close(operator.inv_square_form(v.unsqueeze(0))[0], expected, rtol=1e-7, atol=1e-8)
    assert_close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet, atol=1e-9)


def test_prior_forms_that_mean_the_same_give_the_same():
    basis, eigenvalues = BASES["oblique"], table(RANK, seed=4)
    v = normal(2, N_PARAMS, seed=9)
    reference = LowRank(basis, eigenvalues, 0.7)
    for prior in (torch.full((3,), 0.7), torch.full((N_PARAMS,), 0.7)):
        other = LowRank(basis, eigenvalues, prior.double(), LAYERS)
        assert_close(other.sqrt_solve(v), reference.sqrt_solve(v), rtol=1e-6)
        assert_close(other.logdet(), reference.logdet(), rtol=1e-6)
    assert reference.prior_diagonal.ndim == 0


def test_order_of_directions_changes_nothing():
    basis, eigenvalues = BASES["oblique"], table(RANK, seed=4)
    order, v = torch.tensor([2, 0, 3, 1]), normal(2, N_PARAMS, seed=10)
    first = LowRank(basis, eigenvalues, PRIORS["diagonal"])
    second = LowRank(basis[:, order], eigenvalues[order], PRIORS["diagonal"])
    J = v.unsqueeze(0)
    assert_close(first.inv_square_form(J), second.inv_square_form(J))
    assert_close(first.logdet(), second.logdet())


def test_derived_operators_equal_fresh_ones():
    basis, eigenvalues = BASES["oblique"], table(RANK, seed=4)
    v = normal(N_PARAMS, seed=11)
    operator = LowRank(basis, eigenvalues, 0.7, LAYERS)
    # Fills what is kept, which must not leak into operators with another prior.
    operator.sqrt_solve(v)
    for prior in PRIORS.values():
        derived = operator.scaled(2.0).with_prior(prior).scaled(1.5)
        fresh = LowRank(basis, 3.0 * eigenvalues, prior, LAYERS)
        assert_close(derived.sqrt_solve(v), fresh.sqrt_solve(v))
        assert_close(derived.logdet(), fresh.logdet())


def test_gram_matrix_is_computed_once():
    operator = LowRank(BASES["oblique"], table(RANK, seed=4), 0.7, LAYERS)
    per_layer = operator.scaled(2.0).with_prior(PRIORS["per_layer"])
    for derived in (operator, per_layer, operator.scaled(3.0)):
        derived.logdet()
        assert derived._grams is operator._grams
    kept = dict(operator._grams)
    assert set(kept) == {(N_PARAMS,), LAYERS}
    per_layer.logdet()
    assert all(operator._grams[sizes] is gram for sizes, gram in kept.items())


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["scalar", "one", "per_layer", "diagonal"])
@pytest.mark.parametrize("basis_name", ["orthonormal", "dependent", "empty"])
def test_gradients_reach_prior_and_scale(form, basis_name):
    basis = BASES[basis_name]
    # Repeated eigenvalues: the derivative of an eigendecomposition would not exist here.
    operator = LowRank(basis, torch.ones(basis.shape[1], dtype=torch.float64), 1.0, LAYERS)
    J = normal(2, 2, N_PARAMS, seed=12)

    def quantities(prior: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        P = operator.with_prior(prior).scaled(h)
        return (
            P.logdet(),
            P.sqrt_solve(J),
            P.square_norm(J),
            P.inv_square_form(J),
        )

    prior = PRIORS[form].clone().requires_grad_()
    h = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quantities, (prior, h), fast_mode=True)


def test_gradient_in_scale_is_finite_at_zero_scale_and_zero_eigenvalues():
    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    basis, eigenvalues = BASES["orthonormal"], table(RANK, seed=4)
    LowRank(basis, eigenvalues, 0.5, scale=h).logdet().backward()
    assert_close(h.grad, eigenvalues.sum() / 0.5)


def test_each_result_of_one_operator_can_be_differentiated():
    h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    operator = LowRank(BASES["orthonormal"], table(RANK, seed=4), 0.5, scale=h)
    with torch.no_grad():
        operator.logdet()  # must not leave a factor without graph behind
    for _ in range(2):
        operator.logdet().backward()
    assert h.grad > 0


def test_first_use_in_inference_mode_leaves_a_usable_operator():
    operator = LowRank(BASES["orthonormal"], table(RANK, seed=4), 0.5)
    v = normal(N_PARAMS, seed=13).requires_grad_()
    with torch.inference_mode():
        operator.sqrt_solve(v)
    operator.sqrt_solve(v).sum().backward()
    assert v.grad.isfinite().all()


def test_first_use_of_a_differentiable_operator_in_inference_mode_leaves_it_differentiable():
    h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    basis, eigenvalues = BASES["oblique"], table(RANK, seed=4)
    for prior in (PRIORS["scalar"].clone(), PRIORS["per_layer"].clone()):
        prior.requires_grad_()
        operator = LowRank(basis, eigenvalues, prior, LAYERS, scale=h)
        with torch.inference_mode():
            operator.logdet()
        operator.logdet().backward()
        assert prior.grad.isfinite().all()


# --- precision ---------------------------------------------------------------------------------


def test_float32_variance_survives_curvature_far_above_the_prior():
    n_params, rank = 400, 20
    basis = orthogonal(n_params, 0)[:, :rank]
    eigenvalues = torch.logspace(0, 8, rank, dtype=torch.float64)
    double = LowRank(basis, eigenvalues, 1e-2)
    single = LowRank(basis.float(), eigenvalues.float(), 1e-2)
    J = (normal(5, 3, rank, seed=14) @ basis.T).contiguous()
    exact, rounded = double.inv_square_form(J), single.inv_square_form(J.float())
    assert torch.linalg.eigvalsh(rounded).min() > 0
    assert_close(rounded.double(), exact, rtol=1e-2, atol=1e-4)
    # One output along the stiffest direction: the difference form loses it, the root keeps it.
    stiff = basis[:, -1].reshape(1, 1, -1)
    assert double.inv_square_form(stiff) < 1.01e-8
    assert 0 <= single.inv_square_form(stiff.float()) < 1e-6
    assert_close(single.logdet().double(), double.logdet(), rtol=1e-5)


# --- a value -----------------------------------------------------------------------------------


def test_no_method_changes_the_operator_or_its_inputs():
    basis, eigenvalues, prior = BASES["oblique"], table(RANK, seed=4), PRIORS["per_layer"].clone()
    operator = LowRank(basis, eigenvalues, prior, LAYERS)
    before = copy.deepcopy((basis, eigenvalues, prior, operator.to_matrix()))
    v = normal(2, 2, N_PARAMS, seed=15)
    v_before = v.clone()
    for use in ("sqrt_solve", "square_norm", "inv_square_form"):
        getattr(operator, use)(v)
    operator.scaled(3.0), operator.with_prior(2.0), operator.detach()
    after = (basis, eigenvalues, prior, operator.to_matrix())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(v, v_before)
    with pytest.raises(AttributeError):
        operator.scale = 2.0


def test_detach_keeps_the_matrix():
    h = torch.tensor(2.0, requires_grad=True)
    operator = LowRank(BASES["oblique"], table(RANK, seed=4), PRIORS["per_layer"], LAYERS, h)
    assert operator.to_matrix().requires_grad
    assert not operator.detach().to_matrix().requires_grad
    assert_close(operator.detach().to_matrix(), operator.to_matrix().detach())


def test_repr_gives_sizes_rather_than_entries():
    operator = LowRank(BASES["oblique"], table(RANK, seed=4), 1.0)
    assert repr(operator) == "LowRank(9 parameters, rank 4, torch.float64, cpu)"


# --- bad input ---------------------------------------------------------------------------------

U, LAMBDA, V = torch.eye(4)[:, :2], torch.ones(2), torch.ones(4)
GOOD = LowRank(U, LAMBDA, 1.0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GOOD.sqrt_solve(torch.ones(3)), ValueError, "z must have 4 entries"),
        (lambda: GOOD.sqrt_solve(V.double()), TypeError, "z must have the dtype"),
        (lambda: GOOD.sqrt_solve(torch.ones(())), ValueError, "z must have 4 entries"),
        (lambda: GOOD.square_norm([1.0]), TypeError, r"v must be a torch\.Tensor"),
        (lambda: GOOD.inv_square_form(V), ValueError, r"J must be \[n, C, P\]"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_dependent_columns_beyond_the_precision_are_refused_with_a_remedy():
    columns = normal(50, 3, seed=16).repeat(1, 4).float()
    operator = LowRank(columns, torch.full((12,), 1e9), 1e-3)
    with pytest.raises(RuntimeError, match="orthonormalise the basis"):
        operator.logdet()
