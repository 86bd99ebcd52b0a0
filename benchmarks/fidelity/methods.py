"""The rows of the tables: which posterior, with which options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A posterior and how it is fitted.

    Attributes:
        name: as printed.
        options: arguments of ``DebiasedLaplace``.
        samples_per_budget: curvature samples per unit of budget (10 for one-column Fisher types at
            equal numbers of backward passes).
        overlap: share of the magnitude batch that is also in the direction batch, for two batches
            of half the budget each; None for the scheme's own split.
        automatic: whether the posterior chooses its budget itself.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    samples_per_budget: int = 1
    overlap: float | None = None
    automatic: bool = False


# Sampling is spelled out: the library's own default depends on the scheme.
def _kron(
    name: str, scheme: str, magnitudes: str, sampling: str = "uniform", **more: Any
) -> Method:
    return Method(name, {"scheme": scheme, "magnitudes": magnitudes, "sampling": sampling, **more})


def _low_rank(name: str, scheme: str, sampling: str = "uniform", **more: Any) -> Method:
    return Method(
        name, {"hessian_structure": "lowrank", "scheme": scheme, "sampling": sampling, **more}
    )


LAPLACE_TORCH = _kron("laplace-torch K-FAC (single, kfac)", "single", "kfac")
PAPER = _kron("paper (two_batch, kfac)", "two_batch", "kfac")

KRON = (
    LAPLACE_TORCH,
    PAPER,
    _kron("single, ggn", "single", "ggn"),
    _kron("two_batch, ggn", "two_batch", "ggn"),
    _kron("cross_fit, ggn", "cross_fit", "ggn"),
    _kron("single, ggn, curvature", "single", "ggn", sampling="curvature"),
    _kron("two_batch, ggn, curvature", "two_batch", "ggn", sampling="curvature"),
    _kron("cross_fit, ggn, curvature", "cross_fit", "ggn", sampling="curvature"),
)

FULL_DATA = (
    _kron("laplace-torch K-FAC on all data", "single", "kfac"),
    _kron("single, ggn on all data", "single", "ggn"),
)
"""Rows that use every sample, fitted once."""

LOW_RANK = (
    _low_rank("low rank, single (FullLaplace on the batch)", "single"),
    _low_rank("low rank, two_batch", "two_batch"),
    _low_rank("low rank, cross_fit", "cross_fit"),
    _low_rank("low rank, single, curvature", "single", sampling="curvature"),
    _low_rank("low rank, cross_fit, curvature", "cross_fit", sampling="curvature"),
)

DEFAULTS = (Method("ours, no options at all", automatic=True),)
"""What a user gets who chooses nothing; run it at the budget that the library recommends."""

POOLS = (
    *(
        _kron(
            f"cross_fit, ggn, curvature, pool of {size}",
            *("cross_fit", "ggn", "curvature"),
            pool_size=size,
        )
        for size in (512, 1_024, 2_048, 4_096, 8_192)
    ),
    _kron("cross_fit, ggn, curvature", "cross_fit", "ggn", sampling="curvature"),
)
"""How many samples are scored; last as many as the library chooses."""

SPLITS = (
    *(
        _kron(
            f"two_batch, ggn, {share:.0%} directions", "two_batch", "ggn", direction_fraction=share
        )
        for share in (0.125, 0.25, 0.5, 0.75, 0.875)
    ),
    *(
        Method(
            f"two_batch, ggn, {overlap:.0%} overlap",
            {"scheme": "two_batch", "magnitudes": "ggn", "sampling": "uniform"},
            overlap=overlap,
        )
        for overlap in (0.0, 0.5, 1.0)
    ),
)
"""How a budget is split between directions and magnitudes."""

FOLDS = (
    *(_kron(f"cross_fit, ggn, {k} folds", "cross_fit", "ggn", folds=k) for k in (2, 4, 8)),
    *(
        _kron(
            f"cross_fit, ggn, curvature, {k} folds",
            "cross_fit",
            "ggn",
            folds=k,
            sampling="curvature",
        )
        for k in (2, 4, 8)
    ),
    *(_kron(f"cross_fit, kfac, {k} folds", "cross_fit", "kfac", folds=k) for k in (2, 4)),
)
"""Into how many folds a cross-fit splits its budget."""

FISHERS = (
    *(
        _kron(f"cross_fit, ggn, {fisher} Fisher", "cross_fit", "ggn", fisher=fisher)
        for fisher in ("type2", "mc", "empirical")
    ),
    Method(
        "cross_fit, ggn, MC Fisher on 10·m",
        {"scheme": "cross_fit", "magnitudes": "ggn", "fisher": "mc", "sampling": "uniform"},
        10,
    ),
    Method(
        "K-FAC, MC Fisher on 10·m", {"scheme": "single", "magnitudes": "kfac", "fisher": "mc"}, 10
    ),
)
"""Which Fisher, at equal samples and at equal numbers of backward passes."""

SIZES = (
    LAPLACE_TORCH,
    PAPER,
    _kron("single, ggn", "single", "ggn"),
    _kron("cross_fit, ggn", "cross_fit", "ggn"),
    _kron("cross_fit, ggn, curvature", "cross_fit", "ggn", sampling="curvature"),
)
"""The main methods, for budgets from a few samples to most of the data."""
