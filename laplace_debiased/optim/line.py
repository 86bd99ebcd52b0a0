"""A quadratic along a line, and what to do where it has no minimum there."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import torch
from torch import Tensor

from laplace_debiased.optim.quadratic import Quadratic


class NonPositiveCurvature(StrEnum):
    """What to do along a direction d with dᵀHd ≤ 0 (up to rounding) in either quadratic.

    The recurrence that makes the next direction needs positive curvature of the direction
    quadratic. Where that fails the iteration ends under every policy.

    * ``STOP``: end before this direction.
    * ``SKIP``: step size 0 where only the magnitude quadratic fails, and go on; else as ``STOP``.
    * ``ABSOLUTE``: step −slope/|curvature|, still a descent of the magnitude quadratic; 0 where
      the curvature cannot be told from 0.
    * ``RAISE``: RuntimeError.
    """

    STOP = "stop"
    SKIP = "skip"
    ABSOLUTE = "absolute"
    RAISE = "raise"


@dataclass(frozen=True, eq=False)
class Line:
    """The restriction q(x + αd) = q(x) + α·slope + ½α²·curvature.

    Attributes:
        slope: dᵀ(g + Hx).
        curvature: dᵀHd.
        resolution: Size of the rounding error of ``curvature``; below it the sign means nothing.
        product: Hd [P].
    """

    slope: float
    curvature: float
    resolution: float
    product: Tensor

    @property
    def is_convex(self) -> bool:
        """Whether the curvature is positive beyond rounding."""
        return self.curvature > self.resolution

    def step_size(self, policy: NonPositiveCurvature) -> float:
        """The minimiser α = −slope/curvature, or what ``policy`` puts in its place."""
        if self.is_convex:
            return -self.slope / self.curvature
        match policy:
            case NonPositiveCurvature.ABSOLUTE:
                resolved = abs(self.curvature) > self.resolution
                return -self.slope / abs(self.curvature) if resolved else 0.0
            case NonPositiveCurvature.STOP | NonPositiveCurvature.SKIP | NonPositiveCurvature.RAISE:
                return 0.0
        assert_never(policy)


def restrict(quadratic: Quadratic, direction: Tensor, residual: Tensor, name: str) -> Line:
    """Restrict a quadratic to a line; one product.

    Args:
        quadratic: q.
        direction: d [P].
        residual: g + Hx [P] at the point x that the line starts from.
        name: What the error message calls the quadratic.

    Raises:
        RuntimeError: If the slope or the curvature is not finite.
    """
    product = quadratic.product(direction)
    slope, curvature = float(direction @ residual), float(direction @ product)
    if not (math.isfinite(slope) and math.isfinite(curvature)):
        raise RuntimeError(
            f"The {name} quadratic gave a slope of {slope} and a curvature of {curvature}: its "
            "products are not finite or overflow. Check the data, rescale the problem, or use "
            "float64."
        )
    rounding = torch.finfo(direction.dtype).eps * float(direction.norm()) * float(product.norm())
    return Line(slope, curvature, rounding, product)
