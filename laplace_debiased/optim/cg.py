"""Conjugate gradients with directions from one quadratic and step sizes from another."""

from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.network.modes import public_call
from laplace_debiased.optim.krylov import Krylov
from laplace_debiased.optim.line import Line, NonPositiveCurvature, restrict
from laplace_debiased.optim.matvec import Matvec, as_matvec
from laplace_debiased.optim.quadratic import Quadratic
from laplace_debiased.optim.result import CGResult, Point, Row, collect
from laplace_debiased.optim.termination import DEFAULT_TERMINATION, StopReason, Termination


@public_call
def debiased_cg(
    quadratic_directions: Quadratic,
    quadratic_magnitudes: Quadratic | None = None,
    *,
    initial: Tensor | None = None,
    preconditioner: Any = None,
    termination: Termination = DEFAULT_TERMINATION,
    nonpositive_curvature: NonPositiveCurvature | str = NonPositiveCurvature.STOP,
    refresh_every: int | None = None,
    keep_vectors: bool = True,
) -> CGResult:
    """Minimise the magnitude quadratic along the CG directions of the direction quadratic.

    The directions d_k are those of CG on q = (H, g), with CG's own recurrences and step sizes. The
    iterate moves by an exact line search of q̃ = (H̃, g̃) along each of them,
    α_k = −d_kᵀ(g̃ + H̃x_k) / (d_kᵀH̃d_k), so q̃ never increases. One product with H and one with H̃
    per iteration: r̃ = g̃ + H̃x follows by recurrence. Source: Tatzel, Mucsányi, Hackel, Hennig,
    "Debiasing Mini-Batch Quadratics for Applications in Deep Learning", ICLR 2025.

    Args:
        quadratic_directions: q, from the batch that gives the directions.
        quadratic_magnitudes: q̃, from an independent batch. None, or the same object, is single
            mode: textbook conjugate gradients on ``quadratic_directions``.
        initial: x_0 [P]; None is 0. It costs one product per quadratic.
        preconditioner: Symmetric positive definite approximation of (H + δI)⁻¹ [P, P], anything
            that ``as_matvec`` takes. It shapes the directions alone.
        termination: When to end.
        nonpositive_curvature: What to do where a quadratic is not convex.
        refresh_every: Recompute r̃ by a product after this many iterations, against the drift of
            its recurrence; None never.
        keep_vectors: Return all iterates and directions, 2K+1 vectors of length P.

    Returns:
        The solution with slopes, curvatures and step sizes.

    Example:
        >>> gradient = torch.tensor([1.0, -2.0])
        >>> own = Quadratic(torch.diag(torch.tensor([1.0, 4.0])), gradient)
        >>> other = Quadratic(torch.diag(torch.tensor([2.0, 3.0])), gradient, damping=0.1)
        >>> result = debiased_cg(own, other)
        >>> result.n_iterations, bool((result.values.diff() <= 0).all())
        (2, True)

    Raises:
        TypeError: If a quadratic is none.
        ValueError: If shapes, precisions or devices differ, ``initial`` is not finite, or the
            preconditioner is not positive definite.
        RuntimeError: If a product is not finite, or under ``NonPositiveCurvature.RAISE``.
    """
    problem = _pose(
        quadratic_directions,
        quadratic_magnitudes,
        preconditioner,
        NonPositiveCurvature(nonpositive_curvature),
        refresh_every,
    )
    state, start_products = _start(problem, initial)
    return _solve(problem, state, termination, keep_vectors, start_products)


@dataclass(frozen=True, eq=False)
class _Problem:
    directions: Quadratic
    magnitudes: Quadratic
    precondition: Matvec
    policy: NonPositiveCurvature
    refresh_every: int | None

    @property
    def is_single(self) -> bool:
        return self.magnitudes is self.directions

    def n_refreshes(self, n_iterations: int) -> int:
        return 0 if self.refresh_every is None else n_iterations // self.refresh_every

    def point(self, state: "_State", keep_vectors: bool) -> Point:
        value = self.magnitudes.value_from_residual(state.x, state.residual)
        return Point(value, state.krylov.norm, state.x if keep_vectors else None)


@dataclass(frozen=True, eq=False)
class _State:
    x: Tensor
    residual: Tensor
    krylov: Krylov
    last: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What became of one direction: where it led, or None for the row if it was not taken."""

    state: _State
    row: Row | None
    is_last: bool


def _pose(
    directions: Quadratic,
    magnitudes: Quadratic | None,
    preconditioner: Any,
    policy: NonPositiveCurvature,
    refresh_every: int | None,
) -> _Problem:
    magnitudes = directions if magnitudes is None else magnitudes
    for name, quadratic in (("directions", directions), ("magnitudes", magnitudes)):
        if not isinstance(quadratic, Quadratic):
            raise TypeError(
                f"quadratic_{name} must be a Quadratic, got {type(quadratic).__name__}: wrap the "
                "operator and its gradient as Quadratic(operator, gradient, damping)."
            )
    g, h = directions.gradient, magnitudes.gradient
    if (g.shape, g.dtype, g.device) != (h.shape, h.dtype, h.device):
        raise ValueError(
            "quadratic_directions and quadratic_magnitudes must share length, precision and "
            f"device, got {tuple(g.shape)} {g.dtype} {g.device} and {tuple(h.shape)} {h.dtype} "
            f"{h.device}."
        )
    if refresh_every is not None and refresh_every < 1:
        raise ValueError(f"refresh_every must be at least 1 or None, got {refresh_every}.")
    precondition = (
        torch.clone
        if preconditioner is None
        else as_matvec(preconditioner, directions.dimension, "preconditioner")
    )
    return _Problem(directions, magnitudes, precondition, policy, refresh_every)


def _start(problem: _Problem, initial: Tensor | None) -> tuple[_State, int]:
    """The state at x_0, and the products that it took with each quadratic."""
    gradient = problem.directions.gradient.detach()
    if initial is None:
        krylov = Krylov.start(gradient, problem.precondition)
        state = _State(torch.zeros_like(gradient), problem.magnitudes.gradient.detach(), krylov)
        return state, 0
    if not isinstance(initial, Tensor):
        raise ArgumentTypeError(f"initial must be a tensor; got {type(initial).__name__}.")
    if initial.shape != gradient.shape or not torch.isfinite(initial).all():
        raise ValueError(
            f"initial must be a finite vector of shape {tuple(gradient.shape)}, got shape "
            f"{tuple(initial.shape)}."
        )
    x = initial.detach().to(gradient, copy=True)
    krylov = Krylov.start(problem.directions.residual(x), problem.precondition)
    residual = krylov.residual if problem.is_single else problem.magnitudes.residual(x)
    return _State(x, residual, krylov), 1


def _solve(
    problem: _Problem,
    state: _State,
    termination: Termination,
    keep_vectors: bool,
    start_products: int,
) -> CGResult:
    gradient_norm = float(problem.directions.gradient.norm())
    points, rows = [problem.point(state, keep_vectors)], list[Row]()
    products = start_products
    while True:
        values = [point.value for point in points]
        reason = termination.check(values, state.krylov.norm, gradient_norm, state.x.numel())
        if reason is not None:
            break
        outcome = _try_direction(problem, state, len(points), keep_vectors)
        products += 1
        if outcome.row is not None:
            state = outcome.state
            points.append(problem.point(state, keep_vectors))
            rows.append(outcome.row)
        if outcome.is_last:
            reason = StopReason.NON_POSITIVE_CURVATURE
            break
    refreshed = products + problem.n_refreshes(len(rows))
    counts = (refreshed, 0) if problem.is_single else (products, refreshed)
    return collect(state.x, state.residual, points, rows, reason, *counts)


def _try_direction(
    problem: _Problem, state: _State, iteration: int, keep_vectors: bool
) -> _Outcome:
    """Take, skip or refuse the next direction; ``iteration`` counts from 1."""
    d, policy = state.krylov.direction, problem.policy
    own = restrict(problem.directions, d, state.krylov.residual, "direction")
    _require_symmetric(state.last, d, own.product, "directions")
    line = (
        own if problem.is_single else restrict(problem.magnitudes, d, state.residual, "magnitude")
    )
    if _refuses(own, line, policy, iteration):
        return _Outcome(state, None, is_last=True)
    step, own_step = line.step_size(policy), own.step_size(policy)
    x = state.x.add(d, alpha=step)
    if problem.n_refreshes(iteration) > problem.n_refreshes(iteration - 1):
        residual = problem.magnitudes.residual(x)
    else:
        residual = state.residual.add(line.product, alpha=step)
    own_residual = (
        residual if problem.is_single else state.krylov.residual.add(own.product, alpha=own_step)
    )
    krylov = state.krylov.advance(own_residual, problem.precondition)
    row = Row(
        slope=line.slope,
        curvature=line.curvature,
        step_size=step,
        own_slope=own.slope,
        own_curvature=own.curvature,
        own_step_size=own_step,
        direction=d if keep_vectors else None,
    )
    last = d, own.product
    return _Outcome(_State(x, residual, krylov, last), row, is_last=not own.is_convex)


def _require_symmetric(
    last: tuple[Tensor, Tensor] | None, direction: Tensor, product: Tensor, name: str
) -> None:
    """Check dᵀ(He) = eᵀ(Hd) for a direction and the one before it: both products are there.

    Raises:
        ValueError: if they differ by more than rounding.
    """
    if last is None:
        return
    before, its_product = last
    difference = float(direction @ its_product - before @ product)
    scale = float(before.norm() * product.norm() + direction.norm() * its_product.norm())
    if abs(difference) > torch.finfo(direction.dtype).eps ** 0.5 * scale:
        raise ValueError(
            f"quadratic_{name} has a matrix that is not symmetric: dᵀHe and eᵀHd differ by "
            f"{difference:.3g} for two directions. Pass a symmetric operator."
        )


def _refuses(own: Line, line: Line, policy: NonPositiveCurvature, iteration: int) -> bool:
    """Whether the iteration ends before this direction."""
    if own.is_convex and line.is_convex:
        return False
    match policy:
        case NonPositiveCurvature.STOP:
            return True
        case NonPositiveCurvature.SKIP:
            return not own.is_convex
        case NonPositiveCurvature.ABSOLUTE:
            return False
        case NonPositiveCurvature.RAISE:
            name, bad = ("magnitude", line) if own.is_convex else ("direction", own)
            raise RuntimeError(
                f"The {name} quadratic has curvature {bad.curvature:.3g} along direction "
                f"{iteration}, within rounding of 0 or below: raise the damping, use the GGN in "
                "place of the Hessian, or choose another nonpositive_curvature."
            )
    assert_never(policy)
