"""What a network must return, and what its weights must be, for it to have a curvature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from laplace_debiased.errors import ArgumentTypeError, NumericalError
from laplace_debiased.network.inputs import NO_TENSOR

_REPEATABLE = 1e-3
"""Relative. Sums in another order, as on a GPU, differ by round-off, up to 1e-5 in float32."""


def check_outputs(outputs: Tensor, length: int, *, positions: bool = False) -> None:
    """Check that outputs of ``length`` samples are finite, and one row for each.

    Raises:
        ValueError: if they are not [m, C], nor [m, T, C] where ``positions`` allows it.
        NumericalError: if one is NaN or infinite.
    """
    if outputs.ndim not in ((2, 3) if positions else (2,)) or outputs.shape[0] != length:
        sequences = f" or (batch, positions, outputs) = ({length}, T, C)" if positions else ""
        one = outputs.ndim == 1 and len(outputs) == length
        hint = " For one output per sample return outputs.unsqueeze(-1)." if one else ""
        raise ValueError(
            f"the model must return outputs of shape (batch, outputs) = ({length}, C){sequences}; "
            f"got {tuple(outputs.shape)}.{hint}"
        )
    if not outputs.is_floating_point():
        raise ValueError(
            f"the model must return real outputs (logits, or a mean); got {outputs.dtype}. Do not "
            "take the argmax inside the model."
        )
    finite = torch.isfinite(outputs.detach())
    if not bool(finite.all()):
        bad = int((~finite.flatten(1).all(-1)).nonzero()[0])
        raise NumericalError(
            f"the model's outputs are NaN or infinite (first at sample {bad} of the batch). Check "
            "the weights and the inputs for NaN."
        )


def check_repeatable(outputs: Tensor, again: Tensor) -> None:
    """Check that outputs of two passes over the same samples agree, but for the order of sums."""
    difference = largest_difference(outputs, again)
    if difference is not None:
        raise ValueError(
            f"the outputs of the same samples differ by {difference:.2g} between two "
            "forward passes in evaluation mode: the model is stochastic, and has no curvature at "
            "its weights. Apply noise and dropout only where self.training is true."
        )


def largest_difference(outputs: Tensor, again: Tensor) -> float | None:
    """The largest difference between outputs of one shape; None if it may be round-off."""
    outputs, again = outputs.detach(), again.detach()
    eps = torch.finfo(outputs.dtype).eps if outputs.is_floating_point() else 0.0
    tolerance = max(_REPEATABLE, eps**0.5)
    difference = (outputs - again).abs().max()
    return float(difference) if difference > tolerance * (1 + outputs.abs().max()) else None


def checked_tensor(outputs: object) -> Tensor:
    """What a model returned, if it is a tensor; else a TypeError says how to return one."""
    if isinstance(outputs, Tensor):
        return outputs
    keys = f" of {sorted(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    raise TypeError(
        f"{NO_TENSOR}; got {type(outputs).__name__}{keys}. Wrap it in a module whose forward "
        "returns the logits, or return a mapping that has them under 'logits'."
    )


def checked_model(model: object) -> nn.Module:
    """``model`` if it is one, else an ArgumentTypeError."""
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    check_initialised(model)
    return model


def check_initialised(model: nn.Module) -> None:
    """Check that lazy layers have seen a batch, which tells them their shapes.

    Raises:
        ValueError: naming the first parameter or buffer that has no shape yet.
    """
    for name, entry in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(entry, UninitializedParameter | UninitializedBuffer):
            raise ValueError(
                f"{name!r} has no shape yet: its lazy layer has not seen any data. Pass a batch "
                "through the model (and train it) first."
            )


def check_weights(model: nn.Module) -> None:
    """Check that every weight is there, finite, and can be differentiated through.

    Raises:
        ValueError: naming the first parameter that holds no data or is an inference tensor.
        NumericalError: naming the first parameter that is not finite.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__} without running statistics: what it "
                "gives for a sample depends on the others in the batch. Train it with "
                "track_running_stats=True, or use a norm of each sample (GroupNorm, LayerNorm)."
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim > 1 and not parameter.numel():
            raise ValueError(
                f"parameter {name!r} has no entries (shape {tuple(parameter.shape)}); remove its "
                "layer, or freeze it with requires_grad_(False)."
            )
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device and holds no data; load the model's "
                "weights first."
            )
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex ({parameter.dtype}), for which there is no "
                "Gaussian; store its real and imaginary parts (torch.view_as_real) as a parameter."
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
