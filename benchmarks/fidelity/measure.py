"""KL to a reference predictive, over draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.likelihoods import probit


def log_predictive(mean: Tensor, variances: Tensor) -> Tensor:
    """Log probit predictive [G, n, C] from outputs [n, C] and variances [G, n, C]."""
    return probit(mean.double(), variances.double()).log()


def swept(la: Any, inputs: Tensor, priors: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [n, C] and variances [G, n, C] of a posterior under a grid of priors."""
    found = la.predictor.sweep(inputs, la._H_factor, priors, diagonal=True)
    return found.outputs, found.covariances


def kl_to(reference: Tensor, candidate: Tensor) -> Tensor:
    """Mean over inputs of KL(reference ‖ candidate) in nats, per prior [G]."""
    return (reference.exp() * (reference - candidate)).sum(-1).mean(-1)


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: its name.
        budget: curvature samples.
        divergences: KL in nats per reference, draw and prior: [references][draws][priors].
        seconds: median wall time of a fit.
    """

    method: str
    budget: int
    divergences: dict[str, list[list[float]]]
    seconds: float

    def summary(self, reference: str, prior: int) -> dict[str, float]:
        """Mean, half-width of its 95 % interval, median and worst draw, in 1e-3 nats."""
        values = torch.tensor([draw[prior] for draw in self.divergences[reference]]) * 1e3
        spread = float(values.std()) if len(values) > 1 else math.nan
        return {
            "mean": float(values.mean()),
            "interval": 1.96 * spread / math.sqrt(len(values)),
            "median": float(values.median()),
            "worst": float(values.max()),
        }


def measure(
    method: str,
    budget: int,
    seeds: Sequence[int],
    fit: Callable[[int], Callable[[], Tensor]],
    references: dict[str, Tensor],
) -> Row:
    """Fit once per seed and compare.

    Args:
        method: name of the row.
        budget: curvature samples.
        seeds: one draw each.
        fit: makes a fit of a seed and returns what predicts [G, n, C] in logarithms.
        references: log predictives by name.
    """
    divergences: dict[str, list[list[float]]] = {name: [] for name in references}
    seconds = []
    for seed in seeds:
        start = time.perf_counter()
        predict = fit(seed)
        seconds.append(time.perf_counter() - start)
        candidate = predict()
        for name, reference in references.items():
            divergences[name].append(kl_to(reference, candidate).tolist())
    return Row(method, budget, divergences, sorted(seconds)[len(seconds) // 2])
