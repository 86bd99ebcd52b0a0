"""Checks of the numbers that a user hands to a plan, with messages that say what to do."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

__all__ = ["checked_count", "checked_fractions", "checked_seed", "generator_seed"]


def _as_int(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__}).") from None


def checked_count(value: Any, name: str) -> int:
    """Return ``value`` as a positive int.

    Raises:
        TypeError: ``value`` is not an integer (a bool is none either).
        ValueError: ``value`` is zero or negative.
    """
    count = _as_int(value, name)
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}.")
    return count


def checked_seed(seed: Any) -> int:
    """Return ``seed`` as an int.

    Raises:
        TypeError: ``seed`` is not an integer.
    """
    return _as_int(seed, "seed")


def generator_seed(seed: Any) -> int:
    """Return ``seed`` as an int in the range that torch's generators take.

    Raises:
        TypeError: ``seed`` is not an integer.
        ValueError: ``seed`` lies outside -2**63..2**64 - 1.
    """
    number = _as_int(seed, "seed")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must lie in -2**63..2**64 - 1, got {number}.")
    return number


def checked_fractions(folds: int, fractions: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return the share of each fold, or None for equal parts.

    Raises:
        ValueError: Not one positive fraction per fold, or they do not sum to one.
    """
    if fractions is None:
        return None
    shares = tuple(float(share) for share in fractions)
    if len(shares) != folds:
        raise ValueError(f"fractions needs one entry per fold ({folds}), got {len(shares)}.")
    if not all(math.isfinite(share) and share > 0 for share in shares):
        raise ValueError(f"fractions must be positive, got {shares}.")
    if not math.isclose(sum(shares), 1.0, rel_tol=1e-9):
        raise ValueError(f"fractions must sum to 1, got {shares} (sum {sum(shares)}).")
    return shares
