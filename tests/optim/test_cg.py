"""Debiased conjugate gradients against scipy and a dense construction."""

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, cg

from laplace_debiased.optim import (
    NonPositiveCurvature,
    Quadratic,
    StopReason,
    Termination,
    debiased_cg,
)
from tests.optim.problems import (
    RTOL,
    conjugate_directions,
    dense,
    dense_value,
    quadratic,
    spd,
    vector,
)

ALL = Termination(relative_residual=0.0)


def scipy_iterates(q, n, **kwargs):
    found = []
    cg(
        dense(q),
        -q.gradient.numpy(),
        rtol=0.0,
        atol=0.0,
        maxiter=n,
        callback=lambda x: found.append(x.copy()),
        **kwargs,
    )
    return np.stack(found)


@pytest.mark.parametrize("seed", range(3))
def test_single_mode_has_the_iterates_of_scipy(seed):
    q = quadratic(12, seed)
    found = debiased_cg(q, termination=Termination(8, relative_residual=0.0))
    np.testing.assert_allclose(found.iterates[1:], scipy_iterates(q, 8), rtol=RTOL)
    assert found.magnitude_products == 0


def test_single_mode_has_the_iterates_of_scipy_with_a_preconditioner():
    q, M = quadratic(12, 0), spd(12, 9) + torch.eye(12)
    found = debiased_cg(q, preconditioner=M, termination=Termination(8, relative_residual=0.0))
    expected = scipy_iterates(q, 8, M=M.numpy())
    np.testing.assert_allclose(found.iterates[1:], expected, rtol=RTOL)


@pytest.mark.parametrize("seed", range(3))
def test_directions_and_step_sizes_match_a_dense_construction(seed):
    q, other = quadratic(10, seed), quadratic(10, seed + 50)
    found = debiased_cg(q, other, termination=Termination(7, relative_residual=0.0))
    expected = conjugate_directions(dense(q), q.gradient.numpy(), 7)
    np.testing.assert_allclose(found.directions, np.stack(expected), rtol=1e-7)

    H, g, x = dense(other), other.gradient.numpy(), np.zeros(10)
    for k, d in enumerate(expected):
        alpha = -(d @ (g + H @ x)) / (d @ H @ d)
        assert found.slopes[k].item() == pytest.approx(d @ (g + H @ x), rel=1e-7)
        assert found.curvatures[k].item() == pytest.approx(d @ H @ d, rel=1e-7)
        assert found.step_sizes[k].item() == pytest.approx(alpha, rel=1e-7)
        x = x + alpha * d
        np.testing.assert_allclose(found.iterates[k + 1], x, rtol=1e-7)
        assert found.values[k + 1].item() == pytest.approx(g @ x + 0.5 * x @ H @ x, rel=RTOL)
    np.testing.assert_allclose(found.residual, g + H @ x, rtol=1e-7, atol=1e-12)


def test_directions_are_those_of_textbook_cg_on_the_direction_quadratic():
    q, other = quadratic(10, 0), quadratic(10, 50)
    two = debiased_cg(q, other, termination=Termination(6))
    one = debiased_cg(q, termination=Termination(6))
    torch.testing.assert_close(two.own_residual_norms, one.own_residual_norms)
    torch.testing.assert_close(two.directions, one.directions)
    assert not torch.allclose(two.step_sizes, one.step_sizes, rtol=1e-2)


def test_identical_quadratics_give_textbook_cg():
    q, same = quadratic(12, 3), quadratic(12, 3)
    two, one = debiased_cg(q, same), debiased_cg(q)
    torch.testing.assert_close(two.iterates, one.iterates, rtol=RTOL, atol=0)
    assert (two.direction_products, two.magnitude_products) == (12, 12)
    assert (one.direction_products, one.magnitude_products) == (12, 0)
    again = debiased_cg(q, q)
    assert again.magnitude_products == 0


@pytest.mark.parametrize("n_distinct", [1, 3, 6])
def test_textbook_cg_ends_after_as_many_steps_as_there_are_distinct_eigenvalues(n_distinct):
    Q, _ = torch.linalg.qr(spd(12, 1))
    eigenvalues = torch.arange(12, dtype=torch.float64) % n_distinct + 1.0
    q = Quadratic(Q @ torch.diag(eigenvalues) @ Q.T, vector(12, 2))
    found = debiased_cg(q, termination=Termination(relative_residual=1e-10))
    assert found.n_iterations == n_distinct
    assert found.stop_reason is StopReason.RESIDUAL
    expected = np.linalg.solve(dense(q), -q.gradient.numpy())
    np.testing.assert_allclose(found.solution, expected, rtol=RTOL)


def test_debiased_steps_are_exact_when_the_two_quadratics_share_their_matrix():
    # The same H makes B's directions conjugate for B̃ as well, whatever its gradient.
    q = quadratic(12, 0)
    other = Quadratic(q.operator, vector(12, 77), q.damping)
    found = debiased_cg(q, other, termination=ALL)
    expected = np.linalg.solve(dense(other), -other.gradient.numpy())
    np.testing.assert_allclose(found.solution, expected, rtol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    dimension=st.integers(1, 12),
    seeds=st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)),
    rows=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    damping=st.sampled_from([0.0, 1e-6, 1e-2, 10.0]),
    shift=st.sampled_from([0.0, 0.5, 2.0]),
    policy=st.sampled_from(["stop", "absolute"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_magnitude_quadratic_never_increases(
    dimension, seeds, rows, damping, shift, policy, dtype
):
    def make(seed, n_rows, shift):
        H = spd(dimension, seed, n_rows) - shift * torch.eye(dimension, dtype=torch.float64)
        return Quadratic(H.to(dtype), vector(dimension, seed + 1).to(dtype), damping)

    own, other = make(seeds[0], rows[0], 0.0), make(seeds[1], rows[1], shift)
    found = debiased_cg(own, other, nonpositive_curvature=policy)
    exact = Quadratic(other.operator.double(), other.gradient.double(), damping)
    values = np.array([dense_value(exact, x.double()) for x in found.iterates])
    H, g = dense(exact), exact.gradient.norm().item()
    lengths = found.iterates.double().norm(dim=1).numpy()
    scale = np.linalg.norm(H, 2) * lengths**2 + g * lengths
    slack = 20 * dimension * torch.finfo(dtype).eps * np.maximum(scale[1:], scale[:-1])
    assert (np.diff(values) <= slack).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), power=st.integers(-20, 20), both=st.booleans())
def test_scaling_the_quadratics_leaves_the_iterates(seed, power, both):
    # Powers of two, so that scaling is free of rounding.
    def scaled(q, c):
        return Quadratic(c * q.operator, c * q.gradient, c * q.damping)

    own, other, c = quadratic(8, seed), quadratic(8, seed + 500), 2.0**power
    plain = debiased_cg(own, other, termination=Termination(6))
    if both:
        found = debiased_cg(scaled(own, c), scaled(other, c), termination=Termination(6))
    else:
        found = debiased_cg(own, scaled(other, c), termination=Termination(6))
    torch.testing.assert_close(found.iterates, plain.iterates, rtol=RTOL, atol=0)
    torch.testing.assert_close(found.values, c * plain.values, rtol=RTOL, atol=0)


def test_rotating_the_coordinates_rotates_the_iterates():
    own, other = quadratic(8, 1), quadratic(8, 2)
    Q, _ = torch.linalg.qr(spd(8, 3))

    def rotated(q):
        return Quadratic(Q @ q.operator @ Q.T, Q @ q.gradient, q.damping)

    plain = debiased_cg(own, other, termination=Termination(6))
    found = debiased_cg(rotated(own), rotated(other), termination=Termination(6))
    torch.testing.assert_close(found.iterates, plain.iterates @ Q.T, rtol=1e-7, atol=1e-10)


def test_preconditioning_equals_a_change_of_variables():
    # With M⁻¹ = LLᵀ, preconditioned CG is plain CG in z where x = Lz.
    own, other = quadratic(8, 1), quadratic(8, 2)
    M = spd(8, 6) + torch.eye(8)
    L = torch.linalg.cholesky(M)

    def changed(q):
        H = torch.from_numpy(dense(q))
        return Quadratic(L.T @ H @ L, L.T @ q.gradient)

    plain = debiased_cg(changed(own), changed(other), termination=Termination(6))
    found = debiased_cg(own, other, preconditioner=M, termination=Termination(6))
    torch.testing.assert_close(found.iterates, plain.iterates @ L.T, rtol=1e-7, atol=1e-10)


def test_the_exact_inverse_as_preconditioner_needs_one_iteration():
    q = quadratic(12, 0)
    found = debiased_cg(q, preconditioner=np.linalg.inv(dense(q)))
    assert found.n_iterations == 1
    np.testing.assert_allclose(found.solution, np.linalg.solve(dense(q), -q.gradient), rtol=RTOL)


class Counting:
    def __init__(self, matrix):
        self.matrix, self.count = matrix, 0

    def matvec(self, v):
        self.count += 1
        return self.matrix @ v


@pytest.mark.parametrize("single", [False, True])
def test_products_are_counted(single):
    ops = [Counting(spd(8, 1)), Counting(spd(8, 2))]
    own, other = (Quadratic(op, vector(8, 3), 0.1) for op in ops)
    found = debiased_cg(own, None if single else other)
    assert (found.direction_products, found.magnitude_products) == (ops[0].count, ops[1].count)
    assert (ops[1].count == 0) == single


def test_vectors_that_are_not_kept_are_none_and_the_solution_is_the_same():
    own, other = quadratic(10, 1), quadratic(10, 2)
    lean = debiased_cg(own, other, keep_vectors=False)
    assert lean.iterates is None
    assert lean.directions is None
    full = debiased_cg(own, other)
    assert torch.equal(lean.solution, full.solution)
    assert torch.equal(full.iterates[-1], full.solution)


def test_a_gradient_of_zero_takes_no_iteration():
    found = debiased_cg(Quadratic(spd(5, 0), torch.zeros(5, dtype=torch.float64)), quadratic(5, 1))
    assert found.n_iterations == 0
    assert found.stop_reason is StopReason.RESIDUAL
    assert found.iterates.shape == (1, 5)
    assert found.directions.shape == (0, 5)
    assert not found.solution.any()


OPERATORS = {
    "tensor": lambda H: H,
    "numpy": lambda H: H.numpy(),
    "sparse": lambda H: scipy.sparse.csr_matrix(H.numpy()),
    "scipy operator": lambda H: LinearOperator((8, 8), matvec=lambda v: H.numpy() @ v),
    "matvec": Counting,
    "function": lambda H: lambda v: H @ v,
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_every_kind_of_operator_gives_the_same_iterates(kind):
    H, other = spd(8, 1), spd(8, 2)
    wrap = OPERATORS[kind]
    plain = debiased_cg(Quadratic(H, vector(8, 3), 0.1), Quadratic(other, vector(8, 4), 0.1))
    found = debiased_cg(
        Quadratic(wrap(H), vector(8, 3), 0.1), Quadratic(wrap(other), vector(8, 4), 0.1)
    )
    torch.testing.assert_close(found.iterates, plain.iterates, rtol=1e-9, atol=1e-12)


def bent(eigenvalues):
    return Quadratic(torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)), G)


G = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
CONVEX = [1.0, 2.0, 4.0]


@pytest.mark.parametrize("policy", NonPositiveCurvature)
def test_positive_curvature_never_meets_the_policy(policy):
    found = debiased_cg(bent(CONVEX), bent([2.0, 1.0, 3.0]), nonpositive_curvature=policy)
    assert found.n_iterations == 3
    assert found.stop_reason is StopReason.RESIDUAL


def test_stop_ends_before_the_direction():
    found = debiased_cg(bent(CONVEX), bent([-9.0, 1.0, 1.0]))
    assert found.stop_reason is StopReason.NON_POSITIVE_CURVATURE
    assert found.n_iterations < 3
    assert (found.curvatures > 0).all()
    direction_is_concave = debiased_cg(bent([-1.0, -1.0, -1.0]), bent(CONVEX))
    assert direction_is_concave.n_iterations == 0
    assert not direction_is_concave.solution.any()


def test_absolute_steps_by_the_absolute_curvature():
    found = debiased_cg(bent(CONVEX), bent([-9.0, 1.0, 1.0]), nonpositive_curvature="absolute")
    assert (found.curvatures < 0).any()
    expected = -found.slopes / found.curvatures.abs()
    torch.testing.assert_close(found.step_sizes, expected)
    last = debiased_cg(bent([-1.0, -2.0, -1.0]), bent(CONVEX), nonpositive_curvature="absolute")
    assert last.n_iterations == 1  # the direction quadratic has no further direction to give
    assert last.stop_reason is StopReason.NON_POSITIVE_CURVATURE


@pytest.mark.parametrize("tiny", [1e-17, -1e-17])
def test_curvature_within_rounding_of_zero_counts_as_none(tiny):
    # Along e₂ the product has length 1 and the curvature is its rounding error.
    own = Quadratic(torch.eye(2).double(), torch.tensor([0.0, 1.0]).double())
    H = torch.tensor([[1.0, 1.0], [1.0, tiny]], dtype=torch.float64)
    other = Quadratic(H, own.gradient)
    stopped = debiased_cg(own, other)
    assert stopped.stop_reason is StopReason.NON_POSITIVE_CURVATURE
    assert stopped.n_iterations == 0
    assert not debiased_cg(own, other, nonpositive_curvature="absolute").solution.any()


def test_absolute_takes_no_step_along_zero_curvature():
    flat = Quadratic(torch.zeros(3, 3, dtype=torch.float64), G)
    found = debiased_cg(bent(CONVEX), flat, nonpositive_curvature="absolute")
    assert not found.solution.any()


@pytest.mark.parametrize("which", ["direction", "magnitude"])
def test_a_product_that_is_not_finite_is_an_error(which):
    bad, good = Quadratic(lambda v: v * torch.nan, G), bent(CONVEX)
    pair = (bad, good) if which == "direction" else (good, bad)
    with pytest.raises(RuntimeError, match=f"{which} quadratic gave"):
        debiased_cg(*pair)


def test_bad_input_is_named():
    q = bent(CONVEX)
    with pytest.raises(TypeError, match="quadratic_directions must be a Quadratic"):
        debiased_cg(torch.eye(3))
    with pytest.raises(ValueError, match="must share length"):
        debiased_cg(q, quadratic(4, 0))
    with pytest.raises(ValueError, match="must share length, precision"):
        debiased_cg(q, Quadratic(torch.eye(3), G.float()))
    with pytest.raises(ValueError, match="preconditioner must be positive definite"):
        debiased_cg(q, preconditioner=-torch.eye(3))
    with pytest.raises(ValueError, match="preconditioner must have shape"):
        debiased_cg(q, preconditioner=torch.eye(4))
    with pytest.raises(TypeError, match="preconditioner must be a matrix"):
        debiased_cg(q, preconditioner=torch.Tensor)
    with pytest.raises(TypeError, match="termination must be a Termination"):
        debiased_cg(q, termination=5)
    with pytest.raises(ValueError, match="nonpositive_curvature must be one of 'stop'"):
        debiased_cg(q, nonpositive_curvature="hope")


def test_bad_quadratics_are_named():
    with pytest.raises(ValueError, match="operator must have shape"):
        Quadratic(torch.eye(4), G)
    with pytest.raises(TypeError, match="operator must be a matrix"):
        Quadratic("H", G)
    with pytest.raises(ValueError, match="not finite"):
        Quadratic(torch.eye(3), G * torch.inf)
    with pytest.raises(ValueError, match=r"shape \[P\]"):
        Quadratic(torch.eye(3), torch.eye(3))
    with pytest.raises(TypeError, match="float32 or float64"):
        Quadratic(torch.eye(3), G.half())
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping"):
            Quadratic(torch.eye(3), G, damping)
    with pytest.raises(ValueError, match="same shape, got"):
        Quadratic(lambda v: v[:1], G).product(G)


def test_the_input_is_left_alone():
    own, other = quadratic(6, 0), quadratic(6, 1)
    before = [t.clone() for t in (own.gradient, other.gradient, own.operator)]
    state = torch.get_rng_state()
    debiased_cg(own, other)
    debiased_cg(own)
    after = (own.gradient, other.gradient, own.operator)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())
