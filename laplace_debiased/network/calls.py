"""A model called with other parameters, without a write to its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call_with(
    model: nn.Module,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``model(*args, **kwargs)`` with other parameters and buffers; tied ones move together.

    ``torch.func.functional_call`` swaps and restores a tensor once per *name*. A module that is
    registered under two names (``self.head = self.layers[-1]``) then keeps the swapped tensor in
    place of its parameter. Here every place is swapped once.

    Args:
        model: the module; left untouched.
        values: tensors by the name of the entry that they replace.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    places: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for attribute, entry in (*module._parameters.items(), *module._buffers.items()):
            if entry is not None:
                places.setdefault(id(entry), []).append(f"{prefix}{attribute}")
    entries = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    expanded = {
        place: value for name, value in values.items() for place in places[id(entries[name])]
    }
    return torch.func.functional_call(model, expanded, args, dict(kwargs or {}), tie_weights=False)
