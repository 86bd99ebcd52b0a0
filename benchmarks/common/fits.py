"""Curvature fits of three libraries on the same samples; each lives in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from curvlinops import EKFACLinearOperator
from laplace import KronLaplace
from torch import nn

from benchmarks.common.cases import Case, build_case
from laplace_debiased.factory import DebiasedLaplace


def ours(case: Case, batch: int, scheme: str, magnitudes: str) -> float:
    """Fit our posterior; the trace of its curvature, summed over data."""
    posterior = DebiasedLaplace(case.model, scheme=scheme, magnitudes=magnitudes)
    posterior.fit(case.fit_loader(batch), n_samples=None)
    return sum(
        float((block.eigenvalues.double() * block.multiplicities()).sum())
        for block in posterior.H.blocks
    )


def kron_laplace(case: Case, batch: int) -> float:
    """Fit laplace-torch's posterior; the trace of its curvature, summed over data."""
    posterior = KronLaplace(case.model, "classification")
    posterior.fit(case.fit_loader(batch))
    eigenvalues = posterior.H.eigenvalues
    return sum(
        float(torch.stack([e.double().sum() for e in block]).prod()) for block in eigenvalues
    )


def ekfac(case: Case, batch: int) -> float:
    """Compute curvlinops' eigenvalue-corrected factors, type 2; the trace, summed over data."""
    operator = EKFACLinearOperator(
        case.model,
        nn.CrossEntropyLoss(reduction="sum"),
        [p for p in case.model.parameters() if p.requires_grad],
        list(case.fit_loader(batch)),
        fisher_type="type-2",
        check_deterministic=False,
        num_per_example_loss_terms=1,
        num_data=len(case.fit_data[0]),
    )
    operator.compute_kronecker_factors()
    operator.compute_eigenvalue_correction()
    return float(operator.trace)


METHODS: dict[str, Callable[[Case, int], float]] = {
    "laplace-torch KronLaplace": kron_laplace,
    "ours, two_batch, kfac": lambda case, batch: ours(case, batch, "two_batch", "kfac"),
    "ours, single, kfac": lambda case, batch: ours(case, batch, "single", "kfac"),
    "curvlinops EKFAC": ekfac,
    "ours, single, ggn": lambda case, batch: ours(case, batch, "single", "ggn"),
    "ours, cross_fit, ggn": lambda case, batch: ours(case, batch, "cross_fit", "ggn"),
}


class Fit:
    """One method on one case."""

    def __init__(self, method: str, **arguments: Any) -> None:
        self._method = METHODS[method]
        self._case = build_case(n_validation=1, **arguments)

    def fit(self, batch: int) -> dict[str, Any]:
        """Fit from scratch, construction included."""
        return {"trace": self._method(self._case, batch)}
