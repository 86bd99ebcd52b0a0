"""Checks of numbers, seeds and flags, with messages that say what to do.

One place and one class of exception per kind of mistake: a value of the wrong kind (``2.5`` or
``"2"`` for a count) raises :class:`ArgumentTypeError`, which is a TypeError and a ValueError; a
value of the right kind out of range raises ValueError.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.errors import ArgumentTypeError


def as_integer(name: str, value: Any) -> int:
    """``value`` as an int; numpy's integers will do, a bool will not.

    Raises:
        ArgumentTypeError: if it is no integer.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            f"{name} must be an int, got {value!r} ({type(value).__name__})."
        ) from None


def checked_integer(name: str, value: Any, minimum: int = 1) -> int:
    """``value`` as an int of at least ``minimum``.

    Raises:
        ArgumentTypeError: if it is no integer.
        ValueError: if it is below ``minimum``.
    """
    named = {0: "a non-negative integer", 1: "a positive integer"}
    wanted = named.get(minimum, f"an integer of at least {minimum}")
    try:
        number = as_integer(name, value)
    except ArgumentTypeError:
        kind = type(value).__name__
        raise ArgumentTypeError(f"{name} must be {wanted}; got {value!r} ({kind}).") from None
    if number < minimum:
        raise ValueError(f"{name} must be {wanted}; got {number}, which is not at least {minimum}.")
    if number >= 2**63:
        raise ValueError(f"{name} must be below 2**63; got {_shown(number)}.")
    return number


AUTO = "auto"
"""What leaves an amount to the library."""


def checked_amount(name: str, value: Any) -> int | str | None:
    """``value`` if it is a positive integer, None or "auto".

    Raises:
        ArgumentTypeError: if it is neither.
        ValueError: if it is below 1, or another string.
    """
    if isinstance(value, str) and value != AUTO:
        raise ValueError(f"{name} must be a positive integer, None or {AUTO!r}; got {value!r}.")
    return value if value is None or isinstance(value, str) else checked_integer(name, value)


FLOAT32_MAX = torch.finfo(torch.float32).max


def checked_number(name: str, value: Any, *, positive: bool = False, unit: str = "") -> float:
    """``value`` as a float of 0 or more that float32 can hold, or above 0.

    Args:
        name: of the argument.
        value: what was given.
        positive: refuse 0, too.
        unit: what it counts, for messages: " of seconds".

    Raises:
        ArgumentTypeError: if it is no real number.
        ValueError: if it is out of range.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise ArgumentTypeError(f"{name} must be a number{unit}; got {type(value).__name__}.")
    if not 0 <= value <= FLOAT32_MAX or (positive and value == 0):
        wanted = "positive" if positive else "0 or more"
        raise ValueError(
            f"{name} must be finite and {wanted}, at most {FLOAT32_MAX:.2g}; got {_shown(value)}."
        )
    return float(value)


def _shown(number: Any) -> str:
    """A number for messages; of more digits than a float has room for its sign."""
    try:
        return f"{float(number):g}"
    except OverflowError:
        return "a number beyond 1e308" if number > 0 else "a number below -1e308"


def checked_flag(name: str, value: Any) -> bool:
    """``value`` if it is True or False.

    Raises:
        ArgumentTypeError: if it is anything else.
    """
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False; got {value!r}.")
    return value


def check_key(name: str, key: Any) -> None:
    """Check that a key of mapping batches is one.

    Raises:
        ArgumentTypeError: if it is not hashable.
    """
    if not isinstance(key, Hashable):
        raise ArgumentTypeError(f"{name} must be a string; got {type(key).__name__}.")


def generator_seed(seed: Any) -> int:
    """``seed`` as an int in the range that torch's generators take.

    Raises:
        ArgumentTypeError: if it is no integer.
        ValueError: if it lies outside -2**63..2**64 - 1.
    """
    number = as_integer("seed", seed)
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must lie in -2**63..2**64 - 1, got {number}.")
    return number


def positive_value(
    name: str, value: Any, dtype: torch.dtype | None = None, *, single: bool = False
) -> float | Tensor:
    """``value`` if it is a positive, finite real number or a tensor of such; arrays as tensors.

    Args:
        name: of the argument.
        value: what was given.
        dtype: that it is used in, where it must not under- or overflow.
        single: refuse a tensor of several entries.

    Raises:
        ArgumentTypeError: if it is no real number or real tensor (a string or a bool is none).
        ValueError: if an entry is not positive and finite, here or there.
    """
    number: float | Tensor
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        if isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided):
            raise TypeError
        number = value if isinstance(value, Tensor) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ArgumentTypeError(
            f"{name} must be a positive number or tensor; got {type(value).__name__}."
        ) from None
    exact = None if isinstance(number, Tensor) else torch.float64
    entries = torch.as_tensor(number, dtype=exact).detach()
    if entries.is_complex() or not _is_positive(entries):
        raise ValueError(f"{name} must be positive and finite; got {shortened(entries)}.")
    if single and entries.numel() != 1:
        raise ValueError(f"{name} must be one number; got shape {tuple(entries.shape)}.")
    if dtype is not None and not _is_positive(entries.to(dtype)):
        raise ValueError(
            f"{name}={shortened(entries)} is zero or infinite in the posterior's "
            f"{dtype}; bring it closer to 1, or use a model in torch.float64."
        )
    return number


def _is_positive(entries: Tensor) -> bool:
    return bool((torch.isfinite(entries) & (entries > 0)).all())


def shortened(values: Tensor, digits: int | None = None) -> str:
    """A tensor's entries, or the first of many, for messages; in full or with some digits."""
    flat = values.flatten()
    shown = [v if digits is None else float(f"{v:.{digits}g}") for v in flat[:4].tolist()]
    return str(shown) if flat.numel() <= 4 else f"{shown}… ({flat.numel()})"
