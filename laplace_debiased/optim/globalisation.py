"""Keeping a Newton step honest: Levenberg-Marquardt damping and backtracking."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

from laplace_debiased.checks import checked_integer
from laplace_debiased.errors import ArgumentTypeError


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Adapt the damping to how well the quadratic foretold the change of the loss.

    With ρ the change of the loss over the change of the undamped quadratic, both on the magnitude
    batch: δ grows by ``factor`` when ρ < ``lower``, shrinks by it when ρ > ``upper`` (Martens 2010,
    section 4.1, where the factor is 3/2).

    Raises:
        ValueError: If ``factor`` is not above 1, or the bounds are out of order.
    """

    factor: float = 1.5
    lower: float = 0.25
    upper: float = 0.75
    min_damping: float = 1e-8
    max_damping: float = 1e8

    def __post_init__(self) -> None:
        _check_real(self, "factor", "lower", "upper", "min_damping", "max_damping")
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise ValueError(f"factor must be finite and above 1, got {self.factor}.")
        if not self.lower < self.upper:
            raise ValueError(f"lower must be below upper, got {self.lower} and {self.upper}.")
        if not 0 < self.min_damping <= self.max_damping:
            raise ValueError(
                "min_damping must be positive and at most max_damping, got "
                f"{self.min_damping} and {self.max_damping}."
            )

    def adapt(self, damping: float, reduction_ratio: float) -> float:
        """The next damping, given ρ; −inf stands for a step that failed."""
        if math.isnan(reduction_ratio):
            raise ValueError("reduction_ratio is NaN: pass -inf for a step that failed.")
        if reduction_ratio < self.lower:
            return min(max(damping * self.factor, self.min_damping), max(damping, self.max_damping))
        if reduction_ratio > self.upper:
            return max(damping / self.factor, min(damping, self.min_damping))
        return damping


@dataclass(frozen=True)
class Backtracking:
    """Shorten a step until the loss falls enough (Armijo; Nocedal & Wright 2006, algorithm 3.1).

    Attributes:
        shrink: Factor between trials, in (0, 1).
        sufficient: Share of the linear decrease to insist on, in [0, 1).
        max_trials: Loss evaluations at most.

    Raises:
        ValueError: If one is out of its range.
    """

    shrink: float = 0.5
    sufficient: float = 1e-2
    max_trials: int = 12

    def __post_init__(self) -> None:
        _check_real(self, "shrink", "sufficient")
        checked_integer("max_trials", self.max_trials)
        if not 0 < self.shrink < 1:
            raise ValueError(f"shrink must lie in (0, 1), got {self.shrink}.")
        if not 0 <= self.sufficient < 1:
            raise ValueError(f"sufficient must lie in [0, 1), got {self.sufficient}.")

    def search(
        self, loss_at: Callable[[float], float], loss: float, slope: float, step_size: float
    ) -> "Trial":
        """The first of ``step_size`` and shorter ones that falls enough, or step size 0.

        ``loss_at`` gives the mean loss at a step size, and infinite or NaN counts as too large;
        ``loss`` is that at 0, and ``slope`` its derivative, taken as 0 if it is positive.
        """
        for n_trials in range(1, self.max_trials + 1):
            trial = loss_at(step_size)
            # A NaN fails the comparison, as it should.
            if trial <= loss + self.sufficient * step_size * min(slope, 0.0):
                return Trial(step_size, trial, n_trials)
            step_size *= self.shrink
        return Trial(0.0, loss, self.max_trials)


@dataclass(frozen=True)
class Trial:
    """A step size, the mean loss there (None if not evaluated), and the evaluations it took."""

    step_size: float
    loss: float | None
    n_evaluations: int


def _check_real(record: object, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ArgumentTypeError(f"{name} must be a number; got {type(value).__name__}.")
