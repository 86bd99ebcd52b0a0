"""Hyper-parameters that fit what is covered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.checks import shortened
from laplace_debiased.curvature import Coverage
from laplace_debiased.errors import ArgumentTypeError


def check_kron_prior(value: object, coverage: Coverage) -> None:
    """Check that a prior precision is scalar or has one entry per covered parameter tensor.

    Raises:
        ValueError: naming the tensors it would have to match.
    """
    names = coverage.covered
    if not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 1:
        return
    if value.ndim == 1 and len(value) == len(names):
        return
    raise ValueError(
        f"prior_precision has shape {tuple(value.shape)}; a Kronecker posterior takes a scalar or "
        f"one entry per covered parameter tensor, {len(names)} here: {', '.join(names)}."
    )


def check_low_rank_prior(value: object, coverage: Coverage) -> None:
    """Check that a prior precision is scalar, per covered parameter tensor, or per entry.

    Raises:
        ValueError: naming the tensors it would have to match.
    """
    names = coverage.covered
    if not isinstance(value, Tensor) or value.numel() == 1:
        return
    if value.ndim != 1 or len(value) not in (len(names), coverage.n_covered):
        raise ValueError(
            f"prior_precision has shape {tuple(value.shape)}; a low-rank posterior takes a "
            f"scalar, one entry per covered parameter tensor ({len(names)} here: "
            f"{', '.join(names)}) or one per entry ({coverage.n_covered})."
        )


def check_prior_mean(value: object, n_params: int | None) -> None:
    """Check that a prior mean is finite, and scalar or one entry per covered parameter.

    Args:
        value: the prior mean.
        n_params: entries that are covered; None while they are not known.

    Raises:
        ArgumentTypeError: if it is neither a number nor a tensor of real ones.
        ValueError: if it is not finite, or of another length.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number or (isinstance(value, Tensor) and not value.is_complex())):
        raise ArgumentTypeError(
            f"prior_mean must be a number or a tensor of real ones; got {type(value).__name__}."
        )
    value = torch.as_tensor(value)
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"prior_mean must be finite; got {shortened(value.detach())}.")
    if n_params is not None and value.numel() not in (1, n_params):
        raise ValueError(
            f"prior_mean has {value.numel()} entries; {n_params} parameter entries are covered. "
            "Pass a scalar, or one entry per covered parameter entry (see la.coverage)."
        )


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
            with torch.inference_mode(False), torch.no_grad():
                self._kept = key, build()
        return self._kept[1]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _same(one: Any, two: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(two, int | float)
    return one == two if numbers else one is two
