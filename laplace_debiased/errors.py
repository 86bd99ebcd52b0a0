"""Exceptions that are the library's own. Everything else is Python's ValueError and TypeError."""

from __future__ import annotations

import torch


class ArgumentTypeError(TypeError, ValueError):
    """An argument of the wrong kind: a string for a number, 2.5 for a count."""


class MissingKeyError(ValueError, KeyError):
    """A mapping batch without the entry that it should have."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class NotFittedError(ValueError, AttributeError):
    """The posterior has no curvature yet: call ``fit`` first."""


class ReadOnlyError(ValueError, AttributeError):
    """An attribute of a posterior that follows from others, and is not set."""


class NumericalError(FloatingPointError, ValueError):
    """NaN or infinity where a finite number is needed, or a decomposition that fails."""


class CoverageError(ValueError):
    """A posterior cannot cover the parameters it was asked to cover."""


class ModelChangedError(RuntimeError):
    """The model's weights are no longer those that the posterior was fitted to."""


class StoredFileError(ValueError):
    """A file that cannot be read as what it should hold: damaged, foreign, or too new."""


class ModelCallError(RuntimeError, ValueError):
    """The model fails on the inputs that it was given; its own exception is the cause."""


class MemoryExhaustedError(torch.OutOfMemoryError, MemoryError):
    """Memory ran out, on a GPU or on the CPU; nothing has changed, and the message says how to."""


class RankFailedError(RuntimeError):
    """Another process of a collective call raised; the message says which one, and what."""


class RankLostError(RuntimeError):
    """Another process of a collective call does not answer: it died, or is far too late."""
