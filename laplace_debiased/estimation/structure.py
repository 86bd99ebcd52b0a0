"""What goes into a fit, what comes out of it, and what a structure of the precision answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_debiased.curvature import Coverage, KroneckerFactors
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.debiasing.bias import Comparison
from laplace_debiased.estimation.arguments import Arguments, FitRequest
from laplace_debiased.estimation.checkpoint import FitCheckpoint
from laplace_debiased.estimation.report import FitClock, FitReport
from laplace_debiased.estimation.tally import Tally
from laplace_debiased.estimation.target import Target
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.identity import ModelFingerprint
from laplace_debiased.network.probe import Probe
from laplace_debiased.options import CurvatureOptions, Scheme
from laplace_debiased.parallel.ranks import Ranks
from laplace_debiased.predictive import Predictor


@dataclass(frozen=True, eq=False)
class KronCurvature:
    """Kronecker curvature: *per-sample means*, before any scaling to N.

    The posterior's eigenbasis and the tables of magnitudes along it have one entry per covered
    parameter; beside them are the factors of every fold.
    """

    basis: tuple[BlockBasis, ...]
    tables: tuple[Tensor, ...]
    folds: tuple[KroneckerFactors, ...]


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted curvature of any structure, and what it stands for.

    Attributes:
        curvature: of the structure: :class:`KronCurvature`, or low-rank eigenpairs; per-sample
            means.
        comparisons: for the bias report, per set of directions that was measured: sums of
            magnitudes as the directions' own samples report them and as held-out samples measure
            them. Empty under ``single``.
        mean_loss: mean loss over the draws, in nats.
        n_outputs: C.
        n_samples: draws over which all this was estimated.
        n_data: N.
        scheme: the scheme, resolved.
        coverage: which parameters carry it.
        drawn: dataset indices that budgets have drawn so far.
        model: fingerprint of the network at the fit.
        effective_samples: (Σ w h)² / Σ (w h)² over draws, with h the trace of a sample's loss
            Hessian and w its importance weight: how many samples of equal curvature would give
            as steady an estimate of the scale. Of the latest fit, where fits were added; None
            where it was not computed.
        last_layer: name of the layer, where the fit is of a last layer.
        report: where its time went; None for a fit that was read from a state.
        probe: a sample and its outputs; a made-up one for a fit that was read from a state, None
            where there is none.
    """

    curvature: Any
    comparisons: tuple[Comparison, ...]
    mean_loss: float
    n_outputs: int
    n_samples: int
    n_data: int
    scheme: Scheme
    coverage: Coverage
    drawn: frozenset[int]
    model: ModelFingerprint
    effective_samples: float | None = None
    last_layer: str | None = None
    report: FitReport | None = None
    probe: Probe | None = None


@dataclass(frozen=True, eq=False)
class Order:
    """One fit as it is asked for.

    Attributes:
        target: the network, and which of its weights.
        arguments: what the posterior was asked for.
        request: the call of ``fit``.
        options: the curvature's, with the scheme resolved.
        loss: the loss model.
        model: fingerprint of the network as it is now.
        earlier: the fit that this one is added to; None for a new one.
        ranks: all ranks, in a collective call.
        clock: takes the times.
    """

    target: Target
    arguments: Arguments
    request: FitRequest
    options: CurvatureOptions
    loss: LossModel
    model: ModelFingerprint
    earlier: Fit | None
    ranks: Ranks
    clock: FitClock


@dataclass(frozen=True, eq=False)
class Task(Order):
    """What one fit works on, once its samples are chosen.

    ``is_drawn``: whether samples are drawn, and not whole loaders walked. ``sample``: inputs of the
    first one (of the first batch where the network takes none alone), or None where this rank has
    none. ``checkpoint``: where the walks keep what they have so far, or None.
    """

    plan: CurvaturePlan
    is_drawn: bool
    sample: Any
    coverage: Coverage
    checkpoint: FitCheckpoint | None = field(default=None, repr=False)

    def weights(self, earlier: Fit) -> tuple[int, int]:
        """What the earlier and the new fit count: draws of the same data, so that N stays, or N."""
        if self.is_drawn:
            return earlier.n_samples, sum(self.plan.fold_sizes)
        return earlier.n_data, self.plan.n_data

    def result(self, curvature: Any, comparisons: Sequence[Comparison], tally: Tally) -> Fit:
        """The fit, with what follows from the plan and the earlier fit.

        Curvature and comparisons are of both fits together, where one is added to another; the
        rest is of the new draws. Where a pool was scored its mean loss is taken.
        """
        plan, earlier, n_data = self.plan, self.earlier, self.plan.n_data
        n_samples, last_layer, drawn = sum(plan.fold_sizes), self.target.last_layer, set[int]()
        pool = plan.pool
        mean_loss = tally.mean_loss if pool is None else float(pool.losses.mean())
        if self.is_drawn and plan.indices is not None:
            drawn = set(torch.cat(plan.indices).tolist())
        if earlier is not None:
            old, new = self.weights(earlier)
            mean_loss = (old * earlier.mean_loss + new * mean_loss) / (old + new)
            n_samples, drawn = n_samples + earlier.n_samples, drawn | earlier.drawn
            n_data = earlier.n_data + (0 if self.is_drawn else n_data)
        return Fit(
            curvature,
            tuple(comparisons),
            mean_loss,
            tally.n_outputs,
            n_samples,
            n_data,
            self.options.scheme,
            self.coverage,
            frozenset(drawn),
            self.model,
            tally.effective_samples,
            None if last_layer is None else last_layer.name,
        )


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

        ``chosen`` is what this said when the posterior was made, for what a user may freeze since.
        """

    def engine(self, target: Target, coverage: Coverage) -> Any:
        """What passes over the network for these parameters."""

    def recommended_samples(self, engine: Any, request: FitRequest, loss: LossModel) -> int | None:
        """The budget that ``n_samples="auto"`` stands for; None for everything."""

    def inspect(self, engine: Any, target: Target, inputs: Any, coverage: Coverage) -> Coverage:
        """What a look at the network on a batch leaves of the coverage, with reasons."""

    def estimate(self, engine: Any, task: Task) -> Fit:
        """The fitted curvature, of both fits together where one is added to another."""

    def predictor(self, engine: Any, fit: Fit) -> Predictor:
        """What predicts with a fit."""

    def to_state(self, fit: Fit) -> dict[str, Any]:
        """The curvature as a part of a state: tensors and plain values."""

    def from_state(self, state: Mapping[str, Any], device: torch.device) -> Any:
        """Curvature from a state.

        Raises:
            ValueError: if the state does not fit together.
        """
