"""One lock per model, held while its mode, hooks or weights differ."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_REGISTRY_LOCK = threading.Lock()
_SERIAL = itertools.count()


class ModelLock:
    """A re-entrant lock over a model's modules, held while their mode, hooks or weights differ.

    Args:
        parts: the locks that it stands for; taken in order of creation, so that two models which
            share modules cannot wait for each other.
    """

    def __init__(self, parts: Iterable[_Part]) -> None:
        self._parts = tuple(sorted(set(parts)))

    @property
    def parts(self) -> tuple[_Part, ...]:
        """The locks that it stands for."""
        return self._parts

    def __enter__(self) -> ModelLock:
        held = []
        try:
            for part in self._parts:
                part.lock.acquire()
                held.append(part)
        except BaseException:  # an interrupt between two of them
            for part in reversed(held):
                part.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for part in reversed(self._parts):
            part.lock.release()


@dataclass(frozen=True, order=True)
class _Part:
    serial: int
    lock: threading.RLock = field(compare=False, default_factory=threading.RLock)


def model_lock(model: nn.Module) -> ModelLock:
    """One lock per model; models that share a module (a wrapper, a backbone) exclude each other.

    Whoever predicts with the same model waits for their turn; other models go on meanwhile.
    """
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
