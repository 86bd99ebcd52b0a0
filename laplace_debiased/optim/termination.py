"""When conjugate gradients end."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from laplace_debiased.checks import checked_integer, checked_number


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
