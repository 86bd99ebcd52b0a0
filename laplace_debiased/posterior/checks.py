"""Checks of a posterior's hyper-parameters and inputs, with messages that say what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laplace_debiased.errors import NumericalError

HALF_DTYPES = (torch.float16, torch.bfloat16)


def positive_value(name: str, value: object) -> object:
    """Return ``value`` if it is a positive, finite number or tensor of such.

    Raises:
        TypeError: if it is no real number or floating-point tensor.
        ValueError: if an entry is not positive and finite.
    """
    if isinstance(value, bool) or not isinstance(value, Tensor | float | int):
        try:
            value = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise TypeError(
                f"{name} must be a positive number or tensor; got {type(value).__name__}."
            ) from None
    exact = None if isinstance(value, Tensor) else torch.float64
    entries = torch.as_tensor(value, dtype=exact).detach()
    if entries.is_complex() or not bool((torch.isfinite(entries) & (entries > 0)).all()):
        raise ValueError(f"{name} must be positive and finite; got {_short(entries)}.")
    return value


def check_prior_length(value: object, names: Sequence[str], n_params: int) -> None:
    """Check that a prior precision is scalar or has one entry per covered parameter tensor.

    Raises:
        ValueError: naming the tensors it would have to match.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or value.numel() == 1:
        return
    if value.ndim == 1 and len(value) == len(names):
        return
    raise ValueError(
        f"prior_precision has shape {tuple(value.shape)}; a Kronecker posterior takes a scalar or "
        f"one entry per covered parameter tensor, {len(names)} here: {', '.join(names)}."
    )


def check_prior_mean(value: Tensor, n_params: int) -> None:
    """Check that a prior mean is finite, and scalar or one entry per covered parameter.

    Raises:
        ValueError: if not.
    """
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"prior_mean must be finite; got {_short(value.detach())}.")
    if value.numel() not in (1, n_params):
        raise ValueError(
            f"prior_mean has {value.numel()} entries; {n_params} parameter entries are covered. "
            "Pass a scalar, or one entry per covered parameter entry (see la.coverage)."
        )


def require_labels(n_labels: Tensor) -> None:
    """Check that some label counts.

    Args:
        n_labels: labels that count, of every sample [m].

    Raises:
        ValueError: if there is none.
    """
    if not bool((n_labels > 0).any()):
        raise ValueError(
            f"none of the {len(n_labels)} samples has a label that counts: every target is "
            "ignore_index. Check the labels, or ignore_index."
        )


def check_weights(model: nn.Module) -> None:
    """Check that every weight is finite.

    Raises:
        NumericalError: naming the first parameter that is not.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise NumericalError(
                f"parameter {name!r} holds NaN or infinite values; load or train the model again."
            )


def _short(values: Tensor) -> str:
    flat = values.flatten()
    return str(flat.tolist()) if flat.numel() <= 4 else f"{flat[:4].tolist()}… ({flat.numel()})"
