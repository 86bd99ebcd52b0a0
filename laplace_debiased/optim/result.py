"""What conjugate gradients return."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.optim.termination import StopReason


@dataclass(frozen=True, eq=False)
class CGResult:
    """What the iteration found, with K directions taken.

    Scalars per iteration are float64 on the CPU, of the damped quadratics. "own" belongs to the
    direction quadratic along its own iterates; the others belong to the magnitude quadratic.

    Attributes:
        solution: Last iterate [P].
        residual: Gradient of the magnitude quadratic at ``solution`` [P].
        iterates: x_0, ..., x_K [K+1, P], or None if vectors were not kept.
        directions: d_0, ..., d_{K−1} [K, P], or None if vectors were not kept.
        slopes: d_kᵀ(g̃ + H̃x_k) [K].
        curvatures: d_kᵀH̃d_k [K].
        step_sizes: α_k [K].
        values: q̃(x_k) [K+1].
        own_slopes: [K].
        own_curvatures: [K].
        own_step_sizes: [K].
        own_residual_norms: Euclidean [K+1].
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
    own_slopes: Tensor
    own_curvatures: Tensor
    own_step_sizes: Tensor
    own_residual_norms: Tensor
    stop_reason: StopReason
    direction_products: int
    magnitude_products: int

    @property
    def n_iterations(self) -> int:
        """K, the number of directions taken."""
        return self.step_sizes.numel()


@dataclass(frozen=True, eq=False)
class Point:
    """An iterate: q̃ there, the norm of the direction quadratic's residual, and x [P] if kept."""

    value: float
    own_residual_norm: float
    x: Tensor | None


@dataclass(frozen=True, eq=False)
class Row:
    """One direction taken, named as in ``CGResult``; ``direction`` is None if not kept."""

    slope: float
    curvature: float
    step_size: float
    own_slope: float
    own_curvature: float
    own_step_size: float
    direction: Tensor | None


def collect(
    solution: Tensor,
    residual: Tensor,
    points: Sequence[Point],
    rows: Sequence[Row],
    stop_reason: StopReason,
    direction_products: int,
    magnitude_products: int,
) -> CGResult:
    """Stack K+1 points and K rows into one result; vectors that were not kept become None."""
    kept = [point.x for point in points if point.x is not None]
    along = [row.direction for row in rows if row.direction is not None]
    directions = torch.stack(along) if along else solution.new_empty(0, solution.numel())
    return CGResult(
        solution=solution,
        residual=residual,
        iterates=torch.stack(kept) if kept else None,
        directions=directions if kept else None,
        slopes=_column([row.slope for row in rows]),
        curvatures=_column([row.curvature for row in rows]),
        step_sizes=_column([row.step_size for row in rows]),
        values=_column([point.value for point in points]),
        own_slopes=_column([row.own_slope for row in rows]),
        own_curvatures=_column([row.own_curvature for row in rows]),
        own_step_sizes=_column([row.own_step_size for row in rows]),
        own_residual_norms=_column([point.own_residual_norm for point in points]),
        stop_reason=stop_reason,
        direction_products=direction_products,
        magnitude_products=magnitude_products,
    )


def _column(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
