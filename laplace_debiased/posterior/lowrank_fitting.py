"""A low-rank fit from plan to result, and what is added to an earlier one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from laplace_debiased.curvature.lowrank import JoinedPart, matrix_average
from laplace_debiased.data import CurvaturePlan
from laplace_debiased.options import Scheme
from laplace_debiased.posterior.fitting import FitRequest
from laplace_debiased.posterior.lowrank_estimation import LowRankEstimate, LowRankEstimator


@dataclass(frozen=True, eq=False)
class FittedLowRank:
    """A fit that can be added to: the estimate, and what it stands for.

    Attributes:
        estimate: per-sample means.
        n_data: N.
        scheme: the scheme, resolved.
        names: covered parameters.
        drawn: dataset indices that a budget has drawn so far.
    """

    estimate: LowRankEstimate
    n_data: int
    scheme: Scheme
    names: tuple[str, ...]
    drawn: frozenset[int]


def fit_low_rank(
    plan: CurvaturePlan,
    estimator: LowRankEstimator,
    request: FitRequest,
    names: tuple[str, ...],
    previous: FittedLowRank | None,
) -> FittedLowRank:
    """Estimate the curvature of a plan, and add it to an earlier fit if there is one.

    Fits are averaged as matrices, weighted by the number of draws (same N), or by N where the new
    data extend the training set, and decomposed again.

    Raises:
        ValueError: if the earlier fit covers other parameters.
    """
    if previous is not None and previous.names != names:
        raise ValueError("override=False needs the same covered parameters as the earlier fit.")
    estimate, drawn = estimator.estimate(plan), _drawn(plan, request)
    if previous is None:
        return FittedLowRank(estimate, plan.n_data, estimator.options.scheme, names, drawn)
    old, same_n = previous.estimate, request.n_samples is not None
    old_weight = old.n_samples if same_n else previous.n_data
    new_weight = estimate.n_samples if same_n else plan.n_data
    share = new_weight / (old_weight + new_weight)
    pairs = matrix_average(
        [
            JoinedPart(old.pairs.basis, old.pairs.eigenvalues, 1 - share),
            JoinedPart(estimate.pairs.basis, estimate.pairs.eigenvalues, share),
        ],
        estimator.rank,
    )
    joined = replace(
        estimate,
        pairs=pairs,
        comparisons=old.comparisons + estimate.comparisons,
        mean_loss=(1 - share) * old.mean_loss + share * estimate.mean_loss,
        n_samples=old.n_samples + estimate.n_samples,
    )
    n_data = previous.n_data if same_n else previous.n_data + plan.n_data
    return FittedLowRank(joined, n_data, estimator.options.scheme, names, previous.drawn | drawn)


def _drawn(plan: CurvaturePlan, request: FitRequest) -> frozenset[int]:
    if request.n_samples is None or plan.indices is None:
        return frozenset()
    return frozenset(index for fold in plan.indices for index in fold.tolist())
