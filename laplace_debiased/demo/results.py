"""Numbers of the demo: scores per fit, rows over draws, divergences from full-data posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.calibration import Evaluation
from laplace_debiased.demo.data import DigitSplits
from laplace_debiased.demo.posteriors import Posterior

FIXED_PRIOR = 1.0
"""Prior precision of the first comparison with the full-data posteriors."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One fit of one method.

    Attributes:
        evaluations: by test split; the first one, "clean", holds the AUROC.
        distances: KL to each full-data predictive, by name, in nats, mean over clean test inputs.
        prior_precision: what tuning chose; None where there is none.
        seconds: fit, tuning and prediction of the clean test split.
    """

    evaluations: dict[str, Evaluation]
    distances: dict[str, float]
    prior_precision: float | None
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Every number under one name, such as ``clean/nll`` or ``kl/kron@1``."""
        found = {
            f"{split}/{name}": float(value)
            for split, evaluation in self.evaluations.items()
            for name, value in evaluation.to_dict().items()
            if value is not None and name in ("nll", "ece", "brier", "accuracy", "auroc")
        }
        found |= {f"kl/{name}": value for name, value in self.distances.items()}
        if self.prior_precision is not None:
            found["log10_prior_precision"] = math.log10(self.prior_precision)
        return found | {"seconds": self.seconds}


@dataclass(frozen=True, eq=False)
class Row:
    """All fits of one method; one where nothing is drawn.

    Attributes:
        key: short and stable name.
        name: what a table calls it.
        draws: scores per draw.
    """

    key: str
    name: str
    draws: tuple[Scores, ...]

    def values(self, metric: str) -> list[float]:
        """The metric of each draw; empty where it does not apply."""
        return [m[metric] for m in (draw.metrics() for draw in self.draws) if metric in m]

    def summary(self, metric: str) -> tuple[float, float | None] | None:
        """Mean and standard error over draws (None for a single one); None if not applicable."""
        values = torch.tensor(self.values(metric), dtype=torch.float64)
        if len(values) == 0:
            return None
        if len(values) == 1:
            return float(values[0]), None
        return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@dataclass(frozen=True, eq=False)
class Reference:
    """A full-data posterior's predictive on the clean test split at one prior precision."""

    name: str
    prior_precision: float
    probs: Tensor

    def divergence(self, probs: Tensor) -> float:
        """Mean over inputs of KL(reference ‖ probs), in nats."""
        # Sums that are off by float32's rounding would outweigh small divergences.
        mine, other = (p.double() / p.double().sum(-1, keepdim=True) for p in (self.probs, probs))
        per_input = torch.xlogy(mine, mine) - torch.xlogy(mine, other)
        return float(per_input.sum(-1).mean())


@dataclass(frozen=True, eq=False)
class References:
    """The two full-data posteriors, each at two prior precisions.

    Attributes:
        predictives: four of them.
        tuned_prior: the second prior precision: the Kronecker reference's own optimum.
    """

    predictives: tuple[Reference, ...]
    tuned_prior: float

    @classmethod
    def of(cls, kron: Posterior, dense: Posterior, splits: DigitSplits) -> References:
        """Predict with both posteriors."""
        tuned = kron.tuned_prior(splits.validation)
        return cls(
            tuple(
                Reference(f"{name}@{label}", prior, posterior.repredict(splits.test, prior))
                for label, prior in (("1", FIXED_PRIOR), ("tuned", tuned))
                for name, posterior in (("kron", kron), ("dense", dense))
            ),
            tuned,
        )

    def distances(self, predict: Callable[[float], Tensor]) -> dict[str, float]:
        """Divergences from each of them of ``predict`` at its prior precision."""
        probs = {prior: predict(prior) for prior in {r.prior_precision for r in self.predictives}}
        return {r.name: r.divergence(probs[r.prior_precision]) for r in self.predictives}


@dataclass(frozen=True, eq=False)
class Comparison:
    """The finished comparison.

    Attributes:
        rows: the baselines, and posteriors as a user would fit them.
        references: posteriors of all data with exact curvature, which a budget cannot afford.
        tuned_prior: prior precision of the second pair of distances.
        n_samples: m.
        n_data: N.
        n_params: number of the network's parameters.
    """

    rows: tuple[Row, ...]
    references: tuple[Row, ...]
    tuned_prior: float
    n_samples: int
    n_data: int
    n_params: int

    def row(self, key: str) -> Row:
        """The row of a key.

        Raises:
            KeyError: if there is none.
        """
        return {row.key: row for row in (*self.rows, *self.references)}[key]
