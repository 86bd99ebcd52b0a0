"""A fitted curvature, and what it is added to: values that never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laplace_debiased.curvature import Coverage, KroneckerFactors
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.data import CurvaturePlan
from laplace_debiased.debiasing import Comparison
from laplace_debiased.errors import ModelChangedError
from laplace_debiased.estimation.report import FitReport
from laplace_debiased.network.identity import ModelFingerprint
from laplace_debiased.network.probe import Probe
from laplace_debiased.options import Scheme


@dataclass(frozen=True, eq=False)
class KronCurvature:
    """Kronecker curvature: *per-sample means*, before any scaling to N.

    Attributes:
        basis: the posterior's eigenbasis, one entry per covered parameter.
        tables: magnitudes along it, one table per covered parameter.
        folds: factors of every fold.
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


def check_same_model(fit: Fit, present: ModelFingerprint) -> None:
    """Check that the network is as it was at a fit that is to be added to.

    Raises:
        ModelChangedError: if it is not.
    """
    if fit.model != present:
        raise ModelChangedError(
            "override=False adds to a fit at the same weights, but the model has changed since. "
            "Fit anew with override=True."
        )


@dataclass(frozen=True, eq=False)
class Earlier:
    """The fit that a new one is added to.

    Attributes:
        fit: the earlier fit.
        same_data: whether the new samples are of the same training set, so that N stays; else
            they extend it.
    """

    fit: Fit
    same_data: bool

    def check_coverage(self, coverage: Coverage) -> None:
        """Check that the same parameters are covered.

        Raises:
            ValueError: if they are not.
        """
        if self.fit.coverage.covered != coverage.covered:
            raise ValueError("override=False needs the same covered parameters as the earlier fit.")

    def weights(self, plan: CurvaturePlan) -> tuple[int, int]:
        """What the earlier and the new fit count: draws of the same data, else data."""
        if self.same_data:
            return self.fit.n_samples, sum(plan.fold_sizes)
        return self.fit.n_data, plan.n_data

    def share(self, plan: CurvaturePlan) -> float:
        """Share of the new fit in their average."""
        old, new = self.weights(plan)
        return new / (old + new)

    def n_data(self, plan: CurvaturePlan) -> int:
        """N of both together."""
        return self.fit.n_data if self.same_data else self.fit.n_data + plan.n_data

    def mean_loss(self, plan: CurvaturePlan, new: float) -> float:
        """Mean loss of both together, in nats."""
        old_weight, new_weight = self.weights(plan)
        return (old_weight * self.fit.mean_loss + new_weight * new) / (old_weight + new_weight)
