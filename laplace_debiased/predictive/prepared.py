"""The posterior precision, kept from one prediction to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.network.grad_modes import outside_inference_mode


class PreparedPrecision:
    """The posterior precision under the present hyper-parameters, built once for all predictions.

    It is built anew when one of them is another object or was written to in place, and not kept at
    all where one requires gradients: a kept one would carry a graph that the first backward pass
    frees.
    """

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Any] | None = None

    def get(self, build: Callable[[], Any], *dependencies: Any, differentiable: bool) -> Any:
        """The precision, from ``build`` unless it is kept from a call with the same dependencies.

        Args:
            build: makes it.
            dependencies: the hyper-parameters, and the curvature itself.
            differentiable: whether the graph of hyper-parameters that require gradients counts.
        """
        tensors = [value for value in dependencies if isinstance(value, Tensor)]
        if differentiable and any(tensor.requires_grad for tensor in tensors):
            return build()
        key = (*dependencies, *(_version(tensor) for tensor in tensors))
        if self._kept is None or not all(map(_same, self._kept[0], key)):
            # Kept beyond a caller's inference mode, whose tensors autograd could not use later.
            with outside_inference_mode(), torch.no_grad():
                self._kept = key, build()
        return self._kept[1]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same(one: Any, two: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(two, int | float)
    return one == two if numbers else one is two
