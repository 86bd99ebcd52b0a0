"""A low-rank fit from plan to result, and what is added to an earlier one."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from laplace_debiased.curvature.lowrank import JoinedPart, matrix_average
from laplace_debiased.data import CurvaturePlan
from laplace_debiased.estimation.fitting import FitRequest, Fitted, drawn_indices
from laplace_debiased.estimation.lowrank_estimator import LowRankEstimate, LowRankEstimator

FittedLowRank: TypeAlias = Fitted[LowRankEstimate]


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
    estimate, drawn = estimator.estimate(plan), drawn_indices(plan, request)
    if previous is None:
        return Fitted(estimate, plan.n_data, estimator.options.scheme, names, drawn)
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
    return Fitted(joined, n_data, estimator.options.scheme, names, previous.drawn | drawn)
