"""What a structure of the posterior precision says about itself to the pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from laplace_debiased.curvature import Coverage
from laplace_debiased.data import CurvaturePlan, Supply
from laplace_debiased.debiasing import Comparison
from laplace_debiased.estimation.checkpoint import FitCheckpoint
from laplace_debiased.estimation.report import FitClock
from laplace_debiased.estimation.request import FitRequest
from laplace_debiased.estimation.target import Target
from laplace_debiased.estimation.values import Earlier, Fit
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.identity import ModelFingerprint
from laplace_debiased.options import CurvatureOptions
from laplace_debiased.parallel import ALONE, Ranks
from laplace_debiased.predictive import Predictor


@dataclass(frozen=True, eq=False)
class Task:
    """What one fit works on, once its samples are chosen.

    Attributes:
        target: the network, and which of its weights.
        options: the choices; the scheme is resolved.
        loss: the loss model.
        request: the call of ``fit``.
        supply: the loader that they are drawn from; None where two loaders are walked whole.
        plan: which samples.
        coverage: which parameters.
        model: fingerprint of the network.
        clock: takes the times of its stages.
        earlier: the fit that this one is added to, or None.
        ranks: all ranks.
        checkpoint: where the walks keep what they have so far, or None.
    """

    target: Target
    options: CurvatureOptions
    loss: LossModel
    request: FitRequest
    supply: Supply | None
    plan: CurvaturePlan
    coverage: Coverage
    model: ModelFingerprint
    clock: FitClock
    earlier: Earlier | None = None
    ranks: Ranks = ALONE
    checkpoint: FitCheckpoint | None = field(default=None, repr=False)

    @property
    def draws_a_budget(self) -> bool:
        """Whether samples are drawn, and not whole loaders walked."""
        return self.supply is not None and self.supply.budget is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Covered parameters, in order."""
        return self.coverage.covered

    def result(
        self,
        curvature: Any,
        comparisons: Sequence[Comparison],
        mean_loss: float,
        n_outputs: int,
        effective_samples: float | None,
    ) -> Fit:
        """The fit, with what follows from the plan and the earlier fit.

        Args:
            curvature: of both fits together, where one is added to another.
            comparisons: see :class:`Fit`.
            mean_loss: of the new draws, in nats.
            n_outputs: C.
            effective_samples: of the new draws.
        """
        plan, earlier = self.plan, self.earlier
        drawn = _drawn(plan) if self.draws_a_budget else frozenset[int]()
        last_layer = self.target.last_layer
        return Fit(
            curvature,
            tuple(comparisons),
            mean_loss if earlier is None else earlier.mean_loss(plan, mean_loss),
            n_outputs,
            sum(plan.fold_sizes) + (0 if earlier is None else earlier.fit.n_samples),
            plan.n_data if earlier is None else earlier.n_data(plan),
            self.options.scheme,
            self.coverage,
            drawn if earlier is None else earlier.fit.drawn | drawn,
            self.model,
            effective_samples,
            None if last_layer is None else last_layer.name,
        )


def _drawn(plan: CurvaturePlan) -> frozenset[int]:
    if plan.indices is None:
        return frozenset()
    return frozenset(index for fold in plan.indices for index in fold.tolist())


class Structure(Protocol):
    """Kronecker or low rank: eight questions, and no more.

    A new structure is one class that answers them; the pipeline, the posterior's shell, tuning and
    saving know no other difference.
    """

    @property
    def takes_positions(self) -> bool:
        """Whether a sample may have outputs at several positions."""

    @property
    def resumes(self) -> bool:
        """Whether a fit can go on from a checkpoint."""

    def coverage(self, target: Target, chosen: Coverage | None = None) -> Coverage:
        """The parameters that may be covered, as far as it is known before a forward pass.

        Args:
            target: the network, and which of its weights.
            chosen: what this said when the posterior was made, for what a user may freeze since.
        """

    def engine(self, target: Target, coverage: Coverage) -> Any:
        """What passes over the network for these parameters."""

    def recommended_samples(self, engine: Any, request: FitRequest, loss: LossModel) -> int | None:
        """The budget that ``n_samples="auto"`` stands for; None for everything."""

    def inspect(
        self, engine: Any, target: Target, plan: CurvaturePlan, coverage: Coverage
    ) -> Coverage:
        """What a look at the network on the data leaves of the coverage, with reasons."""

    def estimate(self, engine: Any, task: Task) -> Fit:
        """The fitted curvature, of both fits together where one is added to another."""

    def predictor(self, engine: Any, fit: Fit) -> Predictor:
        """What predicts with a fit."""

    def to_state(self, fit: Fit) -> dict[str, Any]:
        """The structure's part of a state: tensors and plain values."""

    def from_state(
        self, state: Mapping[str, Any], device: torch.device
    ) -> tuple[Any, tuple[Comparison, ...]]:
        """Curvature and comparisons from a state.

        Raises:
            ValueError: if the state does not fit together.
        """
