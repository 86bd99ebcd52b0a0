"""Conjugate gradients with directions from one quadratic and step sizes from another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from laplace_debiased.checks import checked_flag, checked_integer, checked_number
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.network.modes import public_call
from laplace_debiased.optim.quadratic import Matvec, Quadratic, as_matvec
from laplace_debiased.options import parse_choice


class StopReason(StrEnum):
    """Why the iteration ended."""

    MAX_ITERATIONS = "max_iterations"
    RESIDUAL = "residual"
    PROGRESS = "progress"
    NON_POSITIVE_CURVATURE = "non_positive_curvature"


@dataclass(frozen=True)
class Termination:
    """Criteria that end the iteration; the first that holds wins.

    The residual is that of the direction quadratic: once it vanishes, that quadratic has no further
    direction to give. Progress is that of the magnitude quadratic: it is the one being minimised.

    Attributes:
        max_iterations: Number of directions at most; None means the number of unknowns.
        relative_residual: End when ‖g + Hx‖ ≤ ``relative_residual``·‖g‖.
        relative_progress: ε of Martens (2010, "Deep learning via Hessian-free optimization",
            section 4.4): end at iteration i when i > k, q(x_i) < 0 and
            (q(x_i) − q(x_{i−k})) / q(x_i) < kε, with k = max(10, i/10). None switches it off;
            the paper has 5e-4.

    Raises:
        ValueError: If a criterion is negative or not finite.
    """

    max_iterations: int | None = None
    relative_residual: float = 1e-5
    relative_progress: float | None = None

    def __post_init__(self) -> None:
        if self.max_iterations is not None:
            checked_integer("max_iterations", self.max_iterations)
        checked_number("relative_residual", self.relative_residual)
        if self.relative_progress is not None:
            checked_number("relative_progress", self.relative_progress)

    def check(
        self,
        values: Sequence[float],
        residual_norm: float,
        gradient_norm: float,
        dimension: int,
    ) -> StopReason | None:
        """The reason to end after iteration i, or None to go on.

        ``values`` are q(x_0), ..., q(x_i) of the magnitude quadratic; the norms are those of the
        direction quadratic's residual at iteration i, and of its gradient.
        """
        iteration = len(values) - 1
        if residual_norm <= self.relative_residual * gradient_norm:
            return StopReason.RESIDUAL
        window = max(10, iteration // 10)
        if self.relative_progress is not None and iteration > window and values[-1] < 0:
            progress = (values[-1] - values[-1 - window]) / values[-1]
            if progress < window * self.relative_progress:
                return StopReason.PROGRESS
        limit = dimension if self.max_iterations is None else self.max_iterations
        return StopReason.MAX_ITERATIONS if iteration >= limit else None


DEFAULT_TERMINATION = Termination()


class NonPositiveCurvature(StrEnum):
    """What to do along a direction d with dᵀHd ≤ 0 (up to rounding) in either quadratic.

    The recurrence that makes the next direction needs positive curvature of the direction
    quadratic. Where that fails the iteration ends under every policy.

    * ``STOP``: end before this direction.
    * ``ABSOLUTE``: step −slope/|curvature|, still a descent of the magnitude quadratic; 0 where
      the curvature cannot be told from 0.
    """

    STOP = "stop"
    ABSOLUTE = "absolute"


@dataclass(frozen=True, eq=False)
class CGResult:
    """What the iteration found, with K directions taken.

    Scalars per iteration are float64 on the CPU, of the damped magnitude quadratic.

    Attributes:
        solution: Last iterate [P].
        residual: Gradient of the magnitude quadratic at ``solution`` [P].
        iterates: x_0, ..., x_K [K+1, P], or None if vectors were not kept.
        directions: d_0, ..., d_{K−1} [K, P], or None if vectors were not kept.
        slopes: d_kᵀ(g̃ + H̃x_k) [K].
        curvatures: d_kᵀH̃d_k [K].
        step_sizes: α_k [K].
        values: q̃(x_k) [K+1].
        own_residual_norms: Euclidean, of the direction quadratic along its own iterates [K+1].
        stop_reason: Why the iteration ended.
        direction_products: Products with the direction quadratic.
        magnitude_products: Products with the magnitude quadratic; 0 in single mode, where the two
            are one.
    """

    solution: Tensor
    residual: Tensor
    iterates: Tensor | None
    directions: Tensor | None
    slopes: Tensor
    curvatures: Tensor
    step_sizes: Tensor
    values: Tensor
    own_residual_norms: Tensor
    stop_reason: StopReason
    direction_products: int
    magnitude_products: int

    @property
    def n_iterations(self) -> int:
        """K, the number of directions taken."""
        return self.step_sizes.numel()


@public_call
def debiased_cg(
    quadratic_directions: Quadratic,
    quadratic_magnitudes: Quadratic | None = None,
    *,
    preconditioner: Any = None,
    termination: Termination = DEFAULT_TERMINATION,
    nonpositive_curvature: NonPositiveCurvature | str = NonPositiveCurvature.STOP,
    keep_vectors: bool = True,
) -> CGResult:
    """Minimise the magnitude quadratic from 0 along the CG directions of the direction quadratic.

    The directions d_k are those of CG on q = (H, g), with CG's own recurrences and step sizes. The
    iterate moves by an exact line search of q̃ = (H̃, g̃) along each of them,
    α_k = −d_kᵀ(g̃ + H̃x_k) / (d_kᵀH̃d_k), so q̃ never increases. One product with H and one with H̃
    per iteration: r̃ = g̃ + H̃x follows by recurrence. Source: Tatzel, Mucsányi, Hackel, Hennig,
    "Debiasing Mini-Batch Quadratics for Applications in Deep Learning", ICLR 2025.

    Args:
        quadratic_directions: q, from the batch that gives the directions.
        quadratic_magnitudes: q̃, from an independent batch. None, or the same object, is single
            mode: textbook conjugate gradients on ``quadratic_directions``.
        preconditioner: Symmetric positive definite approximation of (H + δI)⁻¹ [P, P], anything
            that ``as_matvec`` takes. It shapes the directions alone.
        termination: When to end.
        nonpositive_curvature: What to do where a quadratic is not convex.
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
        TypeError: If a quadratic is none, or another argument is of the wrong kind.
        ValueError: If shapes, precisions or devices differ, a matrix is not symmetric, or the
            preconditioner is not positive definite.
        RuntimeError: If a product is not finite.
    """
    own = quadratic_directions
    target = own if quadratic_magnitudes is None else quadratic_magnitudes
    _check_pair(own, target)
    if not isinstance(termination, Termination):
        kind = type(termination).__name__
        raise ArgumentTypeError(f"termination must be a Termination; got {kind}.")
    policy = parse_choice(NonPositiveCurvature, nonpositive_curvature, "nonpositive_curvature")
    precondition = (
        torch.clone
        if preconditioner is None
        else as_matvec(preconditioner, own.dimension, "preconditioner")
    )
    kept = checked_flag("keep_vectors", keep_vectors)
    return _Iteration(own, target, precondition, policy, kept).run(termination)


def _check_pair(own: Quadratic, target: Quadratic) -> None:
    for name, quadratic in (("directions", own), ("magnitudes", target)):
        if not isinstance(quadratic, Quadratic):
            raise TypeError(
                f"quadratic_{name} must be a Quadratic, got {type(quadratic).__name__}: wrap the "
                "operator and its gradient as Quadratic(operator, gradient, damping)."
            )
    g, h = own.gradient, target.gradient
    if (g.shape, g.dtype, g.device) != (h.shape, h.dtype, h.device):
        raise ValueError(
            "quadratic_directions and quadratic_magnitudes must share length, precision and "
            f"device, got {tuple(g.shape)} {g.dtype} {g.device} and {tuple(h.shape)} {h.dtype} "
            f"{h.device}."
        )


class _Line(NamedTuple):
    """The restriction q(x + αd) = q(x) + α·slope + ½α²·curvature of a quadratic to a line."""

    slope: float  # dᵀ(g + Hx)
    curvature: float  # dᵀHd
    resolution: float  # rounding error of the curvature; below it the sign means nothing
    product: Tensor  # Hd [P]

    @property
    def is_convex(self) -> bool:
        return self.curvature > self.resolution

    def step_size(self, policy: NonPositiveCurvature) -> float:
        """The minimiser α = −slope/curvature, or what ``policy`` puts in its place."""
        resolved = abs(self.curvature) > self.resolution
        if self.is_convex or (policy is NonPositiveCurvature.ABSOLUTE and resolved):
            return -self.slope / abs(self.curvature)
        return 0.0


def _restrict(quadratic: Quadratic, d: Tensor, residual: Tensor, name: str) -> _Line:
    """Along d [P], from the point whose residual is given; one product."""
    product = quadratic.product(d)
    slope, curvature = float(d @ residual), float(d @ product)
    if not (math.isfinite(slope) and math.isfinite(curvature)):
        raise RuntimeError(
            f"The {name} quadratic gave a slope of {slope} and a curvature of {curvature}: its "
            "products are not finite or overflow. Check the data, rescale the problem, or use "
            "float64."
        )
    rounding = torch.finfo(d.dtype).eps * float(d.norm()) * float(product.norm())
    return _Line(slope, curvature, rounding, product)


class _Iteration:
    """Where the iteration stands, and what it has found."""

    def __init__(
        self,
        own: Quadratic,
        target: Quadratic,
        precondition: Matvec,
        policy: NonPositiveCurvature,
        keep_vectors: bool,
    ) -> None:
        self.own, self.target, self.single = own, target, own is target
        self.precondition, self.policy, self.keep_vectors = precondition, policy, keep_vectors
        self.x = torch.zeros_like(own.gradient)
        self.own_residual, self.residual = own.gradient.detach(), target.gradient.detach()
        self.direction, self.inner = torch.zeros_like(self.x), 0.0
        self.last: tuple[Tensor, Tensor, Tensor] | None = None
        self.n_products = 0
        self.values, self.norms = list[float](), list[float]()
        self.iterates, self.directions = list[Tensor](), list[Tensor]()
        self.steps = list[tuple[float, ...]]()

    def run(self, termination: Termination) -> CGResult:
        dimension = self.own.dimension
        self._arrive()
        while not (
            reason := termination.check(self.values, self.norms[-1], self.norms[0], dimension)
        ):
            if not self._step():
                reason = StopReason.NON_POSITIVE_CURVATURE
                break
        steps = torch.tensor(self.steps, dtype=torch.float64).reshape(-1, 3).T.contiguous()
        slopes, curvatures, step_sizes = steps
        taken = torch.stack(self.directions) if self.directions else self.x.new_empty(0, dimension)
        return CGResult(
            solution=self.x,
            residual=self.residual,
            iterates=torch.stack(self.iterates) if self.keep_vectors else None,
            directions=taken if self.keep_vectors else None,
            slopes=slopes,
            curvatures=curvatures,
            step_sizes=step_sizes,
            values=torch.tensor(self.values, dtype=torch.float64),
            own_residual_norms=torch.tensor(self.norms, dtype=torch.float64),
            stop_reason=reason,
            direction_products=self.n_products,
            magnitude_products=0 if self.single else self.n_products,
        )

    def _arrive(self) -> None:
        """Note the iterate, and turn to the next direction (Saad 2003, algorithm 9.1)."""
        self.values.append(self.target.value_from_residual(self.x, self.residual))
        self.norms.append(float(self.own_residual.norm()))
        if self.keep_vectors:
            self.iterates.append(self.x)
        z = self.precondition(self.own_residual)
        inner = float(self.own_residual @ z)
        if not math.isfinite(inner):
            raise RuntimeError(
                "The residual of the direction quadratic is not finite or overflows: check the "
                "data, rescale the problem, or use float64."
            )
        # The square may underflow to 0 for a residual that is not quite 0; below 0 it never goes.
        if inner < 0 or (inner == 0 and self.norms[-1] > 1e-18):
            raise ValueError(
                f"preconditioner must be positive definite, got rᵀM⁻¹r = {inner} for a residual r."
            )
        beta = inner / self.inner if self.inner > 0 else 0.0
        self.direction, self.inner = self.direction.mul(beta).sub_(z), inner

    def _step(self) -> bool:
        """Take or refuse the direction; False where it is the last."""
        d = self.direction
        self.n_products += 1
        own = line = _restrict(self.own, d, self.own_residual, "direction")
        self._require_symmetric("quadratic_directions", own.product, self.last and self.last[1])
        if not self.single:
            line = _restrict(self.target, d, self.residual, "magnitude")
            magnitudes = self.last and self.last[2]
            self._require_symmetric("quadratic_magnitudes", line.product, magnitudes)
        if self.policy is NonPositiveCurvature.STOP and not (own.is_convex and line.is_convex):
            return False
        step = line.step_size(self.policy)
        self.x = self.x.add(d, alpha=step)
        self.residual = self.residual.add(line.product, alpha=step)
        if self.single:
            self.own_residual = self.residual
        else:
            own_step = own.step_size(self.policy)
            self.own_residual = self.own_residual.add(own.product, alpha=own_step)
        self.steps.append((line.slope, line.curvature, step))
        if self.keep_vectors:
            self.directions.append(d)
        self.last = d, own.product, line.product
        self._arrive()
        return own.is_convex

    def _require_symmetric(self, name: str, product: Tensor, its_product: Tensor | None) -> None:
        """Check dᵀ(He) = eᵀ(Hd) for a direction and the one before it: both products are there."""
        if self.last is None or its_product is None:
            return
        d, before = self.direction, self.last[0]
        difference = float(d @ its_product - before @ product)
        scale = float(before.norm() * product.norm() + d.norm() * its_product.norm())
        if abs(difference) > torch.finfo(d.dtype).eps ** 0.5 * scale:
            raise ValueError(
                f"{name} has a matrix that is not symmetric: dᵀHe and eᵀHd differ by "
                f"{difference:.3g} for two directions. Pass a symmetric operator."
            )
