"""Leave the user's model as it was: evaluation mode inside, everything restored outside."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_REGISTRY_LOCK = threading.Lock()

HALF_DTYPES = (torch.float16, torch.bfloat16)


def model_lock(model: nn.Module) -> threading.RLock:
    """One re-entrant lock per model, held while its mode or hooks are changed."""
    with _REGISTRY_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; each module's own mode restored on the way out."""
    with model_lock(model):
        modes = [(module, module.training) for module in model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move a model's input (a tensor, or a mapping that holds tensors) to ``device``."""
    if isinstance(inputs, Tensor) or callable(getattr(inputs, "to", None)):
        return inputs.to(device)
    if isinstance(inputs, MutableMapping):
        return {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in inputs.items()
        }
    return inputs


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is of half precision, else as it is.

    Sums of squares overflow in float16 and lose their digits in bfloat16.
    """
    return tensor.float() if tensor.dtype in HALF_DTYPES else tensor


def batch_length(inputs: Any) -> int:
    """Number of samples of a model's input.

    Raises:
        TypeError: if the input holds no tensor.
    """
    if isinstance(inputs, Tensor):
        return inputs.shape[0]
    if hasattr(inputs, "items"):
        for value in inputs.values():
            if isinstance(value, Tensor) and value.ndim > 0:
                return value.shape[0]
    raise TypeError(
        f"model inputs must be a tensor or a mapping of tensors; got {type(inputs).__name__}."
    )


def select_rows(inputs: Any, rows: slice | Tensor) -> Any:
    """Those samples of a model's input; entries of a mapping that are not per sample are kept."""
    if isinstance(inputs, Tensor):
        return inputs[rows]
    length = batch_length(inputs)
    return {
        key: value[rows]
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == length
        else value
        for key, value in inputs.items()
    }
