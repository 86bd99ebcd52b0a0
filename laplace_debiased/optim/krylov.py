"""The recurrence that makes conjugate directions."""

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from laplace_debiased.optim.matvec import Matvec


@dataclass(frozen=True, eq=False)
class Krylov:
    """Preconditioned conjugate gradients at one iterate (Saad 2003, algorithm 9.1).

    Attributes:
        residual: r = g + Hx [P].
        direction: d [P], conjugate to the ones before it.
        inner: rᵀM⁻¹r, with M⁻¹ the preconditioner.
    """

    residual: Tensor
    direction: Tensor
    inner: float

    @classmethod
    def start(cls, residual: Tensor, precondition: Matvec) -> Self:
        """Begin at steepest descent, in the metric of the preconditioner."""
        z = precondition(residual)
        return cls(residual, -z, _inner(residual, z))

    def advance(self, residual: Tensor, precondition: Matvec) -> Self:
        """The state after a step along ``direction`` that led to ``residual`` [P]."""
        z = precondition(residual)
        inner = _inner(residual, z)
        beta = inner / self.inner if self.inner > 0 else 0.0
        return type(self)(residual, self.direction.mul(beta).sub_(z), inner)

    @property
    def norm(self) -> float:
        """Euclidean norm of the residual."""
        return float(self.residual.norm())


def _inner(residual: Tensor, preconditioned: Tensor) -> float:
    inner = float(residual @ preconditioned)
    if not math.isfinite(inner):
        raise RuntimeError(
            "The residual of the direction quadratic is not finite or overflows: check the data, "
            "rescale the problem, or use float64."
        )
    # The square may underflow to 0 for a residual that is not quite 0; below 0 it never goes.
    if inner < 0 or (inner == 0 and float(residual.norm()) > 1e-18):
        raise ValueError(
            f"preconditioner must be positive definite, got rᵀM⁻¹r = {inner} for a residual r."
        )
    return inner
