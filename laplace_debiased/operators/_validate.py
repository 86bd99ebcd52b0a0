"""Checks that the operators share: a TypeError for a wrong kind or dtype, else a ValueError."""

from numbers import Real

import torch
from torch import Tensor


def require_floating(name: str, value: object) -> Tensor:
    """`value` if it is a float32 or float64 tensor; eigenvalues span more decades than half has."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {value.dtype}; convert it with "
            f"{name}.to(torch.float32)."
        )
    return value


def require_finite(name: str, value: Tensor) -> Tensor:
    """`value` if all its entries are finite."""
    # NaN and inf survive a sum, which needs no temporary of the size of `value`. The entries are
    # looked at only where it is not finite, since finite ones may overflow it.
    if bool(torch.isfinite(value.detach().sum())):
        return value
    finite = torch.isfinite(value.detach())
    if not bool(finite.all()):
        n_bad = int((~finite).sum())
        raise ValueError(
            f"{name} must be finite, got {n_bad} NaN or inf among {value.numel()} entries; look "
            "for NaN in the model's weights, the data or the curvature that it was computed from."
        )
    return value


def require_same_kind(name: str, value: Tensor, like_name: str, like: Tensor) -> Tensor:
    """`value` if it has the dtype and the device of `like`."""
    if value.dtype != like.dtype:
        raise TypeError(
            f"{name} must have the dtype of {like_name}, {like.dtype}, got {value.dtype}; convert "
            "one of them with .to(dtype)."
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {value.device}; move "
            "one of them with .to(device)."
        )
    return value


def require_vectors(name: str, value: object, n_params: int, like: Tensor) -> Tensor:
    """`value` if it is [..., n_params] of the dtype and device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if value.ndim == 0 or value.shape[-1] != n_params:
        raise ValueError(
            f"{name} must have {n_params} entries (one per parameter) in its last dimension, got "
            f"the shape {list(value.shape)}."
        )
    return require_same_kind(name, value, "the operator", like)


def as_scalar(name: str, value: object, like: Tensor) -> Tensor:
    """A finite real number or a one-element tensor as a 0-d tensor of the kind of `like`."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.ndim > 1 or value.is_complex():
            raise ValueError(
                f"{name} must be one real number, got a {value.dtype} tensor of the shape "
                f"{list(value.shape)}."
            )
        scalar = value.reshape(()).to(device=like.device, dtype=like.dtype)
    elif isinstance(value, Real):
        scalar = torch.as_tensor(float(value), device=like.device, dtype=like.dtype)
    else:
        raise ValueError(f"{name} must be one real number, got {type(value).__name__}.")
    return require_finite(name, scalar)
