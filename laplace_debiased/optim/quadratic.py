"""A damped quadratic, known through its gradient and its products."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.checks import checked_number
from laplace_debiased.optim.matvec import Matvec, as_matvec


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The function q(x) = gᵀx + ½ xᵀ(H + δI)x of a displacement x [P].

    The scale is the caller's: give ``gradient`` and ``operator`` both as per-sample means over the
    same batch, so that ``damping`` means the same for every batch size.

    Attributes:
        operator: H, symmetric [P, P]: anything that ``as_matvec`` takes.
        gradient: g [P], the derivative of q at x = 0, in float32 or float64.
        damping: δ ≥ 0, added to the diagonal of H.

    Raises:
        TypeError: If ``gradient`` is not a float32 or float64 tensor, or ``operator`` no operator.
        ValueError: If ``gradient`` is not a finite vector, ``damping`` is negative or not finite,
            or the shapes do not match.
    """

    operator: Any
    gradient: Tensor
    damping: float = 0.0

    def __post_init__(self) -> None:
        gradient = self.gradient
        if not isinstance(gradient, Tensor) or gradient.dtype not in (torch.float32, torch.float64):
            got = gradient.dtype if isinstance(gradient, Tensor) else type(gradient).__name__
            raise TypeError(
                f"gradient must be a float32 or float64 tensor, got {got}. Curvature products in "
                "lower precision lose conjugacy: convert the model first."
            )
        if gradient.ndim != 1 or gradient.numel() == 0:
            raise ValueError(f"gradient must have shape [P], got {tuple(gradient.shape)}.")
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "gradient has entries that are not finite: check the data and the parameters, "
                "or lower the step size."
            )
        object.__setattr__(self, "damping", checked_number("damping", self.damping))
        _ = self._matvec  # a bad operator is reported here, not in the middle of a solve

    @cached_property
    def _matvec(self) -> Matvec:
        return as_matvec(self.operator, self.dimension)

    @property
    def dimension(self) -> int:
        """P, the number of unknowns."""
        return self.gradient.numel()

    def product(self, vector: Tensor) -> Tensor:
        """(H + δI) v [P] for a vector v [P]."""
        return self._matvec(vector).add(vector, alpha=self.damping)

    def residual(self, x: Tensor) -> Tensor:
        """Gradient of q at x [P], g + (H + δI) x [P]; one product."""
        return self.gradient.detach() + self.product(x)

    def value(self, x: Tensor) -> float:
        """q(x) for x [P]; one product."""
        return self.value_from_residual(x, self.residual(x))

    def value_from_residual(self, x: Tensor, residual: Tensor) -> float:
        """q(x) = ½ xᵀ(g + r) from x [P] and its residual r [P]; no product."""
        return 0.5 * float(x @ (self.gradient.detach() + residual))
