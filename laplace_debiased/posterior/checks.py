"""Checks of a posterior's hyper-parameters and inputs, with messages that say what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods import LossModel, SoftmaxCrossEntropy


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


def check_last_layer_name(model: nn.Module, name: str | None) -> None:
    """Check that a name is that of a linear layer.

    Raises:
        ValueError: naming those that there are.
    """
    if name is None:
        return
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    if name not in linear:
        shown = ", ".join(map(repr, linear[-5:])) or "none"
        raise ValueError(
            f"last_layer_name={name!r} is no linear layer of the model; its last ones are {shown}."
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


def rows_sum_to_one(outputs: Tensor) -> Tensor:
    """Whether all outputs [m, C] ([m, T, C]) of a sample are non-negative and sum to one [m]."""
    rows = outputs.detach()
    resolution = max(1e-5, 4 * torch.finfo(rows.dtype).eps)
    sums_to_one = (rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() <= resolution)
    return sums_to_one.reshape(len(rows), -1).all(-1)


def require_logits(loss: LossModel, sums_to_one: Tensor) -> None:
    """Check that class outputs are not probabilities already.

    Softmax of a softmax is a silent error: all that the loss sees are logits between 0 and 1. That
    every row of many sums to one by chance is out of the question.

    Args:
        loss: the loss model.
        sums_to_one: of all samples of a walk, from :func:`rows_sum_to_one` [m].

    Raises:
        ValueError: if all do.
    """
    if not isinstance(loss, SoftmaxCrossEntropy) or loss.allow_probabilities:
        return
    if len(sums_to_one) > 1 and bool(sums_to_one.all()):
        raise ValueError(
            f"the model's outputs are probabilities: those of all {len(sums_to_one)} samples sum "
            "to one. likelihood='classification' takes logits; remove the softmax at the model's "
            "end. If these are logits nevertheless, pass allow_probabilities=True."
        )


def check_weights(model: nn.Module) -> None:
    """Check that every weight is there, finite, and can be differentiated through.

    Raises:
        ValueError: naming the first parameter that holds no data or is an inference tensor.
        NumericalError: naming the first parameter that is not finite.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device and holds no data; load the model's "
                "weights first."
            )
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} was made under torch.inference_mode(), where no derivative "
                "can be taken; build or load the model outside of it."
            )
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise NumericalError(
                f"parameter {name!r} holds NaN or infinite values; load or train the model again."
            )


def _short(values: Tensor) -> str:
    flat = values.flatten()
    return str(flat.tolist()) if flat.numel() <= 4 else f"{flat[:4].tolist()}… ({flat.numel()})"
