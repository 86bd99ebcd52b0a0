"""Priors that fit what is covered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_debiased.checks import shortened


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
        raise ValueError(f"prior_mean must be finite; got {shortened(value.detach())}.")
    if value.numel() not in (1, n_params):
        raise ValueError(
            f"prior_mean has {value.numel()} entries; {n_params} parameter entries are covered. "
            "Pass a scalar, or one entry per covered parameter entry (see la.coverage)."
        )
