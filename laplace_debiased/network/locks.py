"""One lock per model, held while its mode or hooks differ."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator

from torch import nn

from laplace_debiased.network.interrupts import let_through, unbroken

_LOCKS: weakref.WeakKeyDictionary[nn.Module, tuple[threading.RLock, ...]] = (
    weakref.WeakKeyDictionary()
)
_REGISTRY_LOCK = threading.Lock()
_PATIENCE = 0.05
"""Seconds between two looks at whether the user wants to wait no longer."""


@unbroken
def model_lock(model: nn.Module) -> Iterator[None]:
    """Hold the model's locks in the block; waiting for them can be interrupted.

    Whoever predicts with the same model waits for their turn; other models go on meanwhile.
    """
    taken = []
    try:
        for lock in locks_of(model):
            while not lock.acquire(timeout=_PATIENCE):
                let_through()
            taken.append(lock)
        yield
    finally:
        for lock in reversed(taken):
            lock.release()


def locks_of(model: nn.Module) -> tuple[threading.RLock, ...]:
    """A model's re-entrant locks; models that share a module (a wrapper, a backbone) share one.

    In one order for all, so that two models which share modules cannot wait for each other.
    """
    with _REGISTRY_LOCK:
        known = _LOCKS.get(model)
        if known is not None:
            return known
        modules = list(model.modules())
        parts = {part for module in modules for part in _LOCKS.get(module, ())}
        locks = tuple(sorted(parts or {threading.RLock()}, key=id))
        for module in modules:
            _LOCKS.setdefault(module, locks)
        return locks


def _forget_locks() -> None:
    """A forked process has one thread: what others held at the fork is held by no one there."""
    global _REGISTRY_LOCK
    _REGISTRY_LOCK = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
