"""One lock per model, held while its mode or hooks differ."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from laplace_debiased.network.interrupts import let_through, unbroken

_LOCKS: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_REGISTRY_LOCK = threading.Lock()
_SERIAL = itertools.count()
_PATIENCE = 0.05
"""Seconds between two looks at whether the user wants to wait no longer."""


class ModelLock:
    """A re-entrant lock over a model's modules, held while their mode or hooks differ.

    Args:
        parts: the locks that it stands for; taken in order of creation, so that two models which
            share modules cannot wait for each other.
    """

    def __init__(self, parts: Iterable[_Part]) -> None:
        self.parts = tuple(sorted(set(parts)))

    @unbroken
    def held(self) -> Iterator[None]:
        """Hold it in the block; waiting for it can be interrupted."""
        taken = []
        try:
            for part in self.parts:
                while not part.lock.acquire(timeout=_PATIENCE):
                    let_through()
                taken.append(part)
            yield
        finally:
            for part in reversed(taken):
                part.lock.release()


@dataclass(frozen=True, order=True)
class _Part:
    serial: int
    lock: threading.RLock = field(compare=False, default_factory=threading.RLock)


@unbroken
def model_lock(model: nn.Module) -> Iterator[None]:
    """Hold the model's lock in the block.

    Whoever predicts with the same model waits for their turn; other models go on meanwhile.
    """
    with lock_of(model).held():
        yield


def lock_of(model: nn.Module) -> ModelLock:
    """One lock per model; models that share a module (a wrapper, a backbone) exclude each other."""
    with _REGISTRY_LOCK:
        known = _LOCKS.get(model)
        if known is not None:
            return known
        modules = list(model.modules())
        parts = {part for module in modules if module in _LOCKS for part in _LOCKS[module].parts}
        lock = ModelLock(parts or {_Part(next(_SERIAL))})
        for module in modules:
            _LOCKS.setdefault(module, lock)
        return lock


def _forget_locks() -> None:
    """A forked process has one thread: what others held at the fork is held by no one there."""
    global _REGISTRY_LOCK
    _REGISTRY_LOCK = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
