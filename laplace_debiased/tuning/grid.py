"""Which prior precisions a search looks at, and how far it reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from laplace_debiased.checks import checked_integer
from laplace_debiased.errors import ArgumentTypeError

_OPEN_ENDS = (-4.0, 4.0)
"""Exponents between which a search begins where it is not told an end: laplace-torch's."""

_PER_DECADE = 2
"""Grid points per decade, and the least that interpolation needs."""

_BEYOND_BELOW = (2, 4)
_BEYOND_ABOVE = (4, 4)
"""Decades beyond an open end: so many with all points, then so many with one point each.

Prior precisions far above 1e4 are usual, for they compete with N·λ; far below 1e-4 they are not.
In the outer decades predictions hardly change, or as 1/δ, which interpolation follows exactly.
"""

_DECADES = 30
"""Decades around 1 beyond which no prior precision lies: float32 ends at 1e38."""

_FLAT = 1e-5
"""Difference of losses, relative to the loss where that exceeds one, that means nothing."""


_MOST_POINTS = 10_000


@dataclass(frozen=True)
class PriorGrid:
    """A logarithmic grid of prior precisions, that goes on beyond the ends it is not told.

    Attributes:
        log_min: exponent of the lower end; None for 1e-4 and as far below as the loss asks.
        log_max: exponent of the upper end; None for 1e4 and as far above as the loss asks.
        size: points between these ends; None for two per decade.
        base: of the exponents.
        further: decades by which the open ends (lower, upper) reach beyond where they first do.

    Raises:
        ValueError: if it is empty or its ends are out of order.
    """

    log_min: float | None = None
    log_max: float | None = None
    size: int | None = None
    base: float = 10.0
    further: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.size is not None:
            object.__setattr__(self, "size", checked_integer("grid_size", self.size))
            if self.size > _MOST_POINTS:
                raise ValueError(
                    f"grid_size must be at most {_MOST_POINTS:,}; got {self.size}. The loss "
                    "between grid points is known as well."
                )
        for name, value in (("min", self.log_min), ("max", self.log_max), ("base", self.base)):
            if value is None and name != "base":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise ArgumentTypeError(
                    f"log_prior_prec_{name} must be a number; got {type(value).__name__}."
                )
        low, high = self._ends
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("log_prior_prec_min and log_prior_prec_max must be finite.")
        if low > high or (low == high and self.size != 1):
            raise ValueError(
                f"log_prior_prec_min={low} must lie below log_prior_prec_max={high}; give both "
                "where one of them lies beyond -4 or 4."
            )
        if not (math.isfinite(self.base) and self.base > 1):
            raise ValueError(f"log_prior_prec_base must be larger than 1; got {self.base!r}.")
        decades = math.log10(self.base)
        if not (low * decades >= -_DECADES and high * decades <= _DECADES):
            raise ValueError(
                "log_prior_prec_min and log_prior_prec_max must lie within "
                f"±{_DECADES / decades:.3g} for base {self.base:g}; got {low:g} and {high:g}."
            )

    @property
    def _ends(self) -> tuple[float, float]:
        below, above = _OPEN_ENDS
        low = below if self.log_min is None else float(self.log_min)
        return low, above if self.log_max is None else float(self.log_max)

    @property
    def _open(self) -> tuple[bool, bool]:
        """Whether the search may go on below its lower end, and above its upper end."""
        return self.log_min is None and self.size != 1, self.log_max is None and self.size != 1

    def bounded(self) -> PriorGrid:
        """The same without what lies beyond open ends: for searches that pay for every point."""
        low, high = self._ends
        return replace(self, log_min=low, log_max=high)

    def points(self) -> Tensor:
        """Grid points δ [G], ascending, float64."""
        inner, (goes_below, goes_above) = self._inner(), self._open
        below = _beyond(_BEYOND_BELOW, self.further[0]) if goes_below else inner[:0]
        above = _beyond(_BEYOND_ABOVE, self.further[1]) if goes_above else inner[:0]
        return torch.cat([inner[0] * 10.0 ** -below.flip(0), inner, inner[-1] * 10.0**above])

    def _inner(self) -> Tensor:
        low, high = self._ends
        size = self.size
        if size is None:
            size = math.ceil((high - low) * math.log10(self.base) * _PER_DECADE - 1e-9) + 1
        return torch.logspace(low, high, size, base=self.base, dtype=torch.float64)

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Log prior precisions to evaluate [K], and which of them are grid points [G].

        Between grid points of the inner range that lie far apart further nodes are added, so that
        interpolation between neighbours is accurate.
        """
        points, inner = self.points().log(), self._inner().log()
        if len(inner) == 1:
            return points, torch.arange(len(points))
        gap = float(inner[1] - inner[0])
        pieces = max(1, math.ceil(gap * _PER_DECADE / math.log(10.0) - 1e-9))
        steps = torch.arange(1, pieces, dtype=torch.float64) / pieces
        between = (inner[:-1, None] + gap * steps).flatten()
        nodes, order = torch.cat([points, between]).sort()
        return nodes, order.argsort()[: len(points)]

    def best(self, losses: Sequence[float]) -> int | None:
        """Index of the grid point to choose; None if no loss is finite.

        The lowest loss. Where that is at an open end, beyond which nothing changes any more, the
        point at which the loss becomes flat.
        """
        finite = _finite(losses)
        if not finite:
            return None
        best = min(finite, key=lambda index: losses[index])
        flat = losses[best] + _flat(losses[best])
        step = self._inwards(best, finite)
        while step and best + step in finite and losses[best + step] <= flat:
            best += step
        return best

    def wider(self, losses: Sequence[float]) -> PriorGrid | None:
        """A grid that reaches further, where the lowest loss is at an open end and not flat yet."""
        best = min(_finite(losses), key=lambda index: losses[index], default=None)
        # Next to points without a finite loss there is nothing to be gained by going on.
        step = 0 if best is None else self._inwards(best, range(len(losses)))
        if best is None or not step or not math.isfinite(losses[best + step]):
            return None
        if losses[best + step] - losses[best] <= _flat(losses[best]):
            return None
        below, above = self.further
        more = (below + 4, above) if step > 0 else (below, above + 4)
        return replace(self, further=more)

    def _inwards(self, index: int, among: Sequence[int]) -> int:
        """The step from an open end of some points to the next one; 0 anywhere else."""
        below, above = self._open
        if len(among) == 1 or index not in (among[0], among[-1]):
            return 0
        return int(below) if index == among[0] else -int(above)


def _finite(losses: Sequence[float]) -> list[int]:
    return [index for index, loss in enumerate(losses) if math.isfinite(loss)]


def _beyond(decades: tuple[int, int], further: int) -> Tensor:
    """Decades from the end of the inner grid to the points beyond it, ascending."""
    fine, coarse = decades
    near = torch.arange(1, fine * _PER_DECADE + 1, dtype=torch.float64) / _PER_DECADE
    return torch.cat(
        [near, torch.arange(fine + 1.0, fine + coarse + further + 1, dtype=near.dtype)]
    )


def _flat(loss: float) -> float:
    return _FLAT * max(1.0, abs(loss))
