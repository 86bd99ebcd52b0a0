"""The choices a user makes, as enums, and the rules between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, TypeVar

from laplace_debiased.checks import checked_amount, checked_integer, checked_number

DEFAULT_BYTE_BUDGET = 256 * 2**20
"""Working memory of one chunk of a pass, in bytes (beside the model and the results)."""


class Scheme(str, Enum):
    """Which data give the directions, and which the magnitudes along them."""

    SINGLE = "single"
    """One batch gives both: the biased baseline."""

    TWO_BATCH = "two_batch"
    """Directions from B, magnitudes from a disjoint B̃ (Tatzel et al. 2025)."""

    CROSS_FIT = "cross_fit"
    """Every fold is measured along the directions of the others; the folds are then joined."""


class Magnitudes(str, Enum):
    """How curvature along a direction is measured."""

    KFAC = "kfac"
    """Product of the two Kronecker factors' quadratic forms (Tatzel et al. 2025)."""

    GGN = "ggn"
    """The quadratic form of the generalized Gauss-Newton matrix itself (George et al. 2018)."""


class Curvature(StrEnum):
    """The matrix of a local quadratic of the loss."""

    GGN = "ggn"
    """Generalized Gauss-Newton, Jᵀ ∇²_f ℓ J: positive semi-definite for a convex loss."""

    HESSIAN = "hessian"
    """All second derivatives of the loss: may be indefinite."""


class Sampling(str, Enum):
    """How a curvature budget is drawn from the training data."""

    UNIFORM = "uniform"
    """Every sample is as likely as any other; without replacement."""

    CURVATURE = "curvature"
    """In proportion to h·‖φ‖, re-weighted to stay unbiased: h the trace of the loss Hessian, φ what
    a linear last layer reads."""


class Fisher(str, Enum):
    """Which second moment of output gradients stands for the loss Hessian."""

    TYPE2 = "type2"
    """The exact loss Hessian: the generalized Gauss-Newton matrix."""

    MC = "mc"
    """Monte-Carlo estimate of it, with labels drawn from the model."""

    EMPIRICAL = "empirical"
    """Outer products of the gradients at the observed labels."""


class HessianStructure(str, Enum):
    """Structure of the posterior precision."""

    KRON = "kron"
    LOWRANK = "lowrank"


class SubsetOfWeights(str, Enum):
    """Which weights carry a posterior."""

    ALL = "all"
    LAST_LAYER = "last_layer"


class Positions(str, Enum):
    """At which positions of a sequence a prediction is asked for."""

    ALL = "all"
    LAST = "last"


ALL_COLUMNS_UP_TO = 64
"""With up to so many outputs per sample, ``columns="auto"`` takes the whole root."""

SKETCHED_COLUMNS = 2
"""With more, so many random signs of it: see ``likelihoods.models.sketched_columns``."""

_CHOICES: dict[str, type[Enum]] = {
    "scheme": Scheme,
    "magnitudes": Magnitudes,
    "sampling": Sampling,
    "fisher": Fisher,
}
_LEAST = {"mc_samples": 1, "max_rank": 1, "byte_budget": 1, "pool_size": 1, "folds": 2}

Choice = TypeVar("Choice", bound=Enum)


def parse_choice(kind: type[Choice], value: object, argument: str) -> Choice:
    """Turn a string (or the enum itself) into a member of ``kind``.

    Raises:
        ValueError: if it is none of them; the message lists the choices.
    """
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(member.value) for member in kind)
        raise ValueError(f"{argument} must be one of {choices}; got {value!r}.") from None


def parse_option(name: str, value: Any) -> Any:
    """The member that an option of this name stands for; other options as they come.

    Raises:
        ValueError: as :func:`parse_choice`.
    """
    return parse_choice(_CHOICES[name], value, name) if name in _CHOICES else value


@dataclass(frozen=True)
class CurvatureOptions:
    """How a posterior estimates its curvature. Validated at construction.

    Args:
        scheme: which data give directions and which magnitudes.
        magnitudes: how curvature along a direction is measured.
        sampling: how a budget is drawn; see ``estimation/arguments.py`` for its default.
        fisher: which second moment stands for the loss Hessian.
        mc_samples: label draws per sample for ``Fisher.MC``.
        columns: columns per sample for ``Fisher.TYPE2``: None for all of the loss Hessian's root,
            R for so many random signs of it, which estimate it without bias; "auto" for all of up
            to 64, else two.
        folds: number of folds of ``Scheme.CROSS_FIT``.
        direction_fraction: share of a budget that gives the directions in ``Scheme.TWO_BATCH``.
        pool_size: size of the pool from which curvature sampling draws; None for as many samples as
            the budget can use, see :func:`~laplace_debiased.data.pool.useful_pool_size`.
        byte_budget: working memory of one chunk, in bytes. On a GPU the default is larger: an
            eighth of the memory that is free, up to 4 GiB.
        max_rank: eigenvectors that are kept of a Kronecker factor, the leading ones; all directions
            outside of them share one magnitude per direction of the other factor.

    Raises:
        ValueError: for a value out of range, or two options that exclude each other.
    """

    scheme: Scheme = Scheme.CROSS_FIT
    magnitudes: Magnitudes = Magnitudes.GGN
    sampling: Sampling = field(kw_only=True)
    fisher: Fisher = Fisher.TYPE2
    mc_samples: int = 1
    columns: int | str | None = "auto"
    folds: int = 2
    direction_fraction: float = 0.5
    pool_size: int | None = None
    byte_budget: int = DEFAULT_BYTE_BUDGET
    max_rank: int = 1024

    def __post_init__(self) -> None:
        for name in _CHOICES:
            object.__setattr__(self, name, parse_option(name, getattr(self, name)))
        object.__setattr__(self, "columns", checked_amount("columns", self.columns))
        for name, minimum in _LEAST.items():
            value = getattr(self, name)
            if value is not None or name != "pool_size":
                # A plain int: numpy's would not go through a state that holds tensors only.
                object.__setattr__(self, name, checked_integer(name, value, minimum))
        fraction = checked_number("direction_fraction", self.direction_fraction)
        if not 0.0 < fraction < 1.0:
            raise ValueError(
                f"direction_fraction must lie strictly between 0 and 1; got {fraction!r}."
            )
        object.__setattr__(self, "direction_fraction", fraction)
        if self.magnitudes is Magnitudes.KFAC and self.sampling is Sampling.CURVATURE:
            raise ValueError(
                "sampling='curvature' needs magnitudes='ggn': a product of two weighted factors is "
                "not an unbiased estimate of the curvature. Use magnitudes='ggn', or "
                "sampling='uniform'."
            )

    def sketched(self, n_outputs: int) -> int | None:
        """R where the root of a sample with so many outputs is sketched; None where it is whole.

        Args:
            n_outputs: outputs of a sample, at all positions.
        """
        if self.fisher is not Fisher.TYPE2 or self.columns is None:
            return None
        if isinstance(self.columns, str):
            return SKETCHED_COLUMNS if n_outputs > ALL_COLUMNS_UP_TO else None
        return self.columns if self.columns < n_outputs else None

    @property
    def fold_fractions(self) -> tuple[float, ...]:
        """Shares of the disjoint parts into which a budget is split."""
        match self.scheme:
            case Scheme.SINGLE:
                return (1.0,)
            case Scheme.TWO_BATCH:
                return (self.direction_fraction, 1.0 - self.direction_fraction)
            case Scheme.CROSS_FIT:
                return (1.0 / self.folds,) * self.folds
