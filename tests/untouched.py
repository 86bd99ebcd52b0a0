"""One context manager for the promise that the user's world stays as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def _copy(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()


def _modules(model: nn.Module) -> dict[str, Any]:
    return {
        name: {
            "mode": module.training,
            "attributes": tuple(sorted(vars(module))),
            "hooks": tuple(tuple(getattr(module, hooks)) for hooks in _HOOKS),
        }
        for name, module in model.named_modules()
    }


def _tensors(model: nn.Module) -> dict[str, Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: (id(t), _copy(t), t.requires_grad, id(t.grad), _copy(t.grad), t.data_ptr())
        for name, t in named
    }


def _generators(loaders: tuple[Any, ...]) -> list[Any]:
    extra = [g for loader in loaders if (g := getattr(loader, "generator", None)) is not None]
    return [
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),
        np.random.get_state()[2],
        random.getstate(),
        *(generator.get_state() for generator in extra),
    ]


def _globals() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.get_num_threads(),
    )


def equal(one: Any, other: Any) -> bool:
    """Deep equality to the bit."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        if one.is_meta:
            return bool(other.is_meta)
        same_nan = one.is_floating_point() and bool((one.isnan() & other.isnan()).any())
        return (
            torch.equal(one.nan_to_num(), other.nan_to_num())
            if same_nan
            else torch.equal(one, other)
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def world_of(model: nn.Module, *loaders: Any) -> dict[str, Any]:
    """A snapshot of a model, of all random generators, and of torch's settings."""
    return {
        "modules": _modules(model),
        "tensors": _tensors(model),
        "generators": _generators(loaders),
        "globals": _globals(),
    }


@contextmanager
def untouched(model: nn.Module, *loaders: Any) -> Iterator[None]:
    """Assert that model, gradients, modes, hooks, attributes and generators come out unchanged.

    Also when an exception passes through.
    """
    before = world_of(model, *loaders)
    try:
        yield
    finally:
        after = world_of(model, *loaders)
        changed = [name for name in before if not equal(before[name], after[name])]
        assert not changed, f"changed: {changed}"
