"""A damped quadratic, known through its gradient and its products."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from laplace_debiased.checks import checked_number

Matvec = Callable[[Tensor], Tensor]


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
    _matvec: Matvec = field(init=False, repr=False)

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
        object.__setattr__(self, "_matvec", as_matvec(self.operator, self.dimension))

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

    def value_from_residual(self, x: Tensor, residual: Tensor) -> float:
        """q(x) = ½ xᵀ(g + r) from x [P] and its residual r [P]; no product."""
        return 0.5 * float(x @ (self.gradient.detach() + residual))


def as_matvec(operator: Any, dimension: int, name: str = "operator") -> Matvec:
    """Turn a square linear operator into a function on flat vectors.

    Args:
        operator: One of: a matrix (torch tensor, numpy array, scipy sparse) [P, P]; a scipy
            ``LinearOperator``; any object with a ``matvec`` method or with ``@``, such as the
            operators of curvlinops; a function of a vector.
        dimension: P.
        name: What error messages call the operator.

    Returns:
        A function [P] -> [P]. It checks the shape of every product and casts it to the device and
        precision of its argument.

    Raises:
        TypeError: If no product can be made out of ``operator``.
        ValueError: If ``operator`` has a shape and it is not [P, P].
    """
    product = _raw_product(operator, name)
    shape = getattr(operator, "shape", None)
    if shape is not None and tuple(shape) != (dimension, dimension):
        raise ValueError(
            f"{name} must have shape ({dimension}, {dimension}) to match the gradient, "
            f"got {tuple(shape)}."
        )

    def matvec(vector: Tensor) -> Tensor:
        image = product(vector)
        if not isinstance(image, Tensor) or image.shape != vector.shape:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(
                f"{name} must map a vector of shape {tuple(vector.shape)} to a tensor of the same "
                f"shape, got {got}."
            )
        return image.detach().to(vector)

    return matvec


def _raw_product(operator: Any, name: str) -> Matvec:
    if isinstance(operator, Tensor):
        return lambda vector: operator.to(vector) @ vector
    if isinstance(operator, np.ndarray | scipy.sparse.linalg.LinearOperator) or (
        scipy.sparse.issparse(operator)
    ):
        return lambda vector: torch.as_tensor(operator @ vector.cpu().numpy())
    if not isinstance(operator, type):  # of a class these are what its instances have
        if callable(getattr(operator, "matvec", None)):
            return operator.matvec
        if hasattr(operator, "__matmul__"):
            return lambda vector: operator @ vector
        if callable(operator):
            return operator
    raise TypeError(
        f"{name} must be a matrix, a linear operator with `matvec` or `@`, or a function of a "
        f"vector, got {type(operator).__name__}."
    )
