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
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    samples_per_budget: int = 1


def _kron(name: str, scheme: str, magnitudes: str, **more: Any) -> Method:
    return Method(name, {"scheme": scheme, "magnitudes": magnitudes, **more})


def _low_rank(name: str, scheme: str, **more: Any) -> Method:
    return Method(name, {"hessian_structure": "lowrank", "scheme": scheme, **more})


LAPLACE_TORCH = _kron("laplace-torch K-FAC (single, kfac)", "single", "kfac")
PAPER = _kron("paper (two_batch, kfac)", "two_batch", "kfac")

KRON = (
    LAPLACE_TORCH,
    PAPER,
    _kron("single, ggn", "single", "ggn"),
    _kron("two_batch, ggn", "two_batch", "ggn"),
    _kron("cross_fit, ggn", "cross_fit", "ggn"),
    _kron("single, ggn, curvature", "single", "ggn", sampling="curvature"),
    _kron("cross_fit, ggn, curvature", "cross_fit", "ggn", sampling="curvature"),
    _kron(
        "cross_fit, ggn, curvature, ratio",
        "cross_fit",
        "ggn",
        sampling="curvature",
        ratio_step=True,
    ),
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
    _low_rank("low rank, cross_fit, Rayleigh–Ritz", "cross_fit", magnitudes="rayleigh_ritz"),
)

ABLATIONS = (
    _kron("cross_fit, kfac", "cross_fit", "kfac"),
    _kron("cross_fit, ggn, 4 folds", "cross_fit", "ggn", folds=4),
    _kron("cross_fit, ggn, curvature, 4 folds", "cross_fit", "ggn", folds=4, sampling="curvature"),
    _kron("two_batch, ggn, ¼ directions", "two_batch", "ggn", direction_fraction=0.25),
    _kron("two_batch, ggn, ¾ directions", "two_batch", "ggn", direction_fraction=0.75),
    _kron("cross_fit, ggn, MC Fisher", "cross_fit", "ggn", fisher="mc"),
    _kron("cross_fit, ggn, empirical Fisher", "cross_fit", "ggn", fisher="empirical"),
    Method(
        "K-FAC, MC Fisher on 10·m", {"scheme": "single", "magnitudes": "kfac", "fisher": "mc"}, 10
    ),
)
