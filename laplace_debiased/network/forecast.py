"""Says early what a long computation will cost, and what makes it cheap."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from weakref import WeakSet

LONG = 60.0
"""Seconds from which on it is worth a warning."""

_STEADY = 2.0
"""Seconds of work before an estimate is trusted: what runs for the first time is slow."""

_TOLD: WeakSet[object] = WeakSet()


def now() -> float:
    """Seconds of a steady clock."""
    return time.perf_counter()


@dataclass
class Forecast:
    """Warns once, while work is under way, if all of it will take more than a minute.

    Attributes:
        what: the work, as "this fit".
        total: how much there is of it, in any unit.
        advice: what would make it cheap, a sentence.
        owner: whose work it is: of one owner one warning is enough; None for nobody's.
    """

    what: str
    total: float
    advice: str
    owner: object | None = None
    _start: float | None = field(default=None, init=False)
    _done: float = field(default=0.0, init=False)
    _silent: bool = field(default=False, init=False)

    def begin(self) -> None:
        """The clock starts with the first piece of work."""
        if self._start is None:
            self._start = now()

    def done(self, amount: float) -> None:
        """Some more of it is done."""
        self.begin()
        assert self._start is not None
        self._done += amount
        elapsed = now() - self._start
        told = self._silent or (self.owner is not None and self.owner in _TOLD)
        if told or elapsed < _STEADY or not self._done:
            return
        seconds = elapsed * self.total / self._done
        if self._done < self.total and seconds > LONG:
            self._silent = True
            if self.owner is not None:
                _TOLD.add(self.owner)
            warnings.warn(
                f"{self.what} will take about {spoken(seconds)}. {self.advice}",
                UserWarning,
                stacklevel=2,
            )


def spoken(seconds: float) -> str:
    """A duration in words."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
