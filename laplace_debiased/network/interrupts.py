"""Ctrl-C between two moments at which everything is as the user left it, and never within one.

Python runs a signal's handler between any two bytecodes of the main thread, also in the middle of
a ``finally``: a context manager as ``contextlib`` makes it may set something and be interrupted
before its block begins, or be interrupted on the way out before it restores anything. For as long
as a guard of this file is open, a handler of ours stands before the user's. It lets an interrupt
through in the block, and holds it back while something is set or restored.
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class _Interrupts:
    """What the handler knows. Only the main thread, which runs it, reads and writes this.

    Attributes:
        open: guards that have been entered and not left.
        held: how many of them hold interrupts back.
        pending: whether one came meanwhile.
        previous: the handler that ours stands before; None where there is no need of ours.
    """

    __slots__ = ("held", "open", "pending", "previous")

    def __init__(self) -> None:
        self.open, self.held, self.pending = 0, 0, False
        self.previous: Callable[[int, FrameType | None], Any] | None = None


_STATE = _Interrupts()


def _handler(signum: int, frame: FrameType | None) -> None:
    # A guard holds interrupts from its first statement on; before that its frame tells.
    if _STATE.held or (frame is not None and frame.f_code is _LEAVING):
        _STATE.pending = True
    elif _STATE.previous is not None:
        _STATE.previous(signum, frame)


class _Guard(AbstractContextManager[T], Generic[T]):
    """A context manager whose set-up and clean-up no SIGINT cuts in two.

    Between the first statement of ``__enter__`` or ``__exit__`` and the last, all depends on where
    CPython looks for signals: where a Python function begins, where a C function has returned, and
    where a loop jumps back. Plain assignments have none of these.

    Args:
        inner: what it guards.
        holds_block: whether interrupts are held back in the block, too.
    """

    def __init__(self, inner: AbstractContextManager[T], *, holds_block: bool = False) -> None:
        self._inner, self._holds_block = inner, holds_block
        self._in_main_thread = _in_main_thread()

    def __enter__(self) -> T:
        if not self._in_main_thread:
            return self._inner.__enter__()
        _STATE.held += 1
        _STATE.open += 1
        try:
            if _STATE.open == 1:
                _install()
        except BaseException:  # by the user's own handler, while ours is not there yet
            _STATE.open -= 1
            _STATE.held -= 1
            raise
        try:
            value = self._inner.__enter__()
            try:
                if _STATE.held == 1:
                    let_through()
            except BaseException as error:
                self._inner.__exit__(type(error), error, error.__traceback__)
                raise
        except BaseException:
            _leave()
            raise
        if not self._holds_block:
            _STATE.held -= 1
        return value

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        if not self._in_main_thread:
            return self._inner.__exit__(kind, error, trace)
        _STATE.held += 0 if self._holds_block else 1
        try:
            return self._inner.__exit__(kind, error, trace)
        finally:
            _leave()


_LEAVING = _Guard.__exit__.__code__


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _install() -> None:
    """Put our handler before the user's, where that can raise."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is _handler:  # put there by somebody who had found it in a block of ours
        return
    _STATE.previous = None
    # Not Python's (None), ignored, or the end of the process: nobody is left to find anything.
    if callable(previous) and not isinstance(previous, signal.Handlers):
        _STATE.previous = previous
        signal.signal(signal.SIGINT, _handler)


def _leave() -> None:
    """Put the user's handler back if this is the last guard, and let through what is pending."""
    previous, due = _STATE.previous, False
    try:
        # Whoever has set a handler in a block of ours keeps it.
        if _STATE.open == 1 and signal.getsignal(signal.SIGINT) is _handler:
            signal.signal(signal.SIGINT, previous)
    finally:
        _STATE.open -= 1
        _STATE.held -= 1
        if not _STATE.held:
            due, _STATE.pending = _STATE.pending, False
    if due and previous is not None:
        previous(signal.SIGINT, sys._getframe())


def let_through() -> None:
    """Let an interrupt through that has been held back, at a moment where that does no harm."""
    if _in_main_thread() and _STATE.pending and _STATE.previous is not None:
        _STATE.pending = False
        _STATE.previous(signal.SIGINT, sys._getframe())


def unbroken(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """As ``contextlib.contextmanager``, but an interrupt finds the block entered or left.

    What comes before the ``yield`` and after it runs to its end; an interrupt that arrives there
    is let through right after it. Another thread than the main one receives none.
    """
    make = contextmanager(function)

    @functools.wraps(function)
    def guard(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Guard(make(*args, **kwargs))

    return guard


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def uninterrupted() -> AbstractContextManager[None]:
    """A block that runs to its end, for a handful of assignments that belong together."""
    return _Guard(_nothing(), holds_block=True)
