"""Matrix-vector products from whatever the user calls a linear operator."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


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
    shape = getattr(operator, "shape", None)
    if shape is not None and tuple(shape) != (dimension, dimension):
        raise ValueError(
            f"{name} must have shape ({dimension}, {dimension}) to match the gradient, "
            f"got {tuple(shape)}."
        )
    product = _raw_product(operator, name)

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
