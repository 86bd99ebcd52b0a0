"""A fit from loader to estimate: the plan, the walks, and what is added to an earlier fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from laplace_debiased.curvature import KroneckerFactors
from laplace_debiased.data import (
    CurvaturePlan,
    plan_from_loader,
    plan_from_pool,
    plan_from_two_loaders,
)
from laplace_debiased.data.build import budget_pool, checked_budget
from laplace_debiased.debiasing import join_by_rank
from laplace_debiased.estimation.kron_estimator import (
    FoldStatistics,
    KronEstimate,
    KronEstimator,
    joined_estimate,
    posterior_basis,
)
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.rng import derived_seed
from laplace_debiased.options import CurvatureOptions, Sampling, Scheme

MAX_POOL_SIZE = 8_192
"""Cap on the pool of curvature sampling: one forward pass over it is part of the fit."""


AnyEstimate = TypeVar("AnyEstimate")


@dataclass(frozen=True, eq=False)
class FitRequest:
    """The arguments of one call of ``fit``.

    Attributes:
        train_loader: the training loader (B with a magnitude loader).
        magnitude_loader: B̃, or None.
        n_samples: curvature budget in all; None for everything.
        n_data: N where it is not the size of the data set.
        seed: seed of all draws.
        override: whether an earlier fit is replaced.
        progress_bar: show progress.
        dict_key_y: key of the targets in mapping batches.
    """

    train_loader: Any
    magnitude_loader: Any
    n_samples: int | None
    n_data: int | None
    seed: int
    override: bool
    progress_bar: bool
    dict_key_y: str


@dataclass(frozen=True, eq=False)
class Fitted(Generic[AnyEstimate]):
    """A fit that can be added to: the estimate, and what it stands for.

    Attributes:
        estimate: per-sample means.
        n_data: N.
        scheme: the scheme, resolved.
        names: covered parameters.
        drawn: dataset indices that a budget has drawn so far.
    """

    estimate: AnyEstimate
    n_data: int
    scheme: Scheme
    names: tuple[str, ...]
    drawn: frozenset[int]


FittedKron: TypeAlias = Fitted[KronEstimate]


class FirstWalk(Protocol):
    """Anything that gives fold statistics: our own pass, or a laplace-torch backend."""

    def fold_statistics(self, plan: CurvaturePlan) -> FoldStatistics:
        """Walk the plan once."""


def resolve_scheme(asked: Scheme | None, default: Scheme, request: FitRequest) -> Scheme:
    """The scheme of a fit: what was asked, or what the loaders imply.

    Raises:
        ValueError: if the loaders contradict it.
    """
    if request.magnitude_loader is None:
        return asked or default
    if request.n_samples is not None:
        raise ValueError(
            "n_samples draws from one loader; with magnitude_loader both loaders are walked whole. "
            "Give one of the two."
        )
    if asked is Scheme.SINGLE:
        raise ValueError(
            "scheme='single' takes directions and magnitudes from one batch; drop "
            "magnitude_loader, or use scheme='two_batch'."
        )
    return asked or Scheme.TWO_BATCH


def make_plan(
    request: FitRequest,
    options: CurvatureOptions,
    previous: Fitted[Any] | None,
    score: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
) -> CurvaturePlan:
    """Which samples a fit looks at.

    A uniform budget that adds to a fit draws none of its samples again: what is left of the data
    is a uniform sample of them still. What curvature sampling leaves is not (the samples of large
    curvature are gone), so it draws from all of the data anew, with a seed of its own.

    Args:
        request: the arguments of the fit.
        options: the choices; the scheme is resolved.
        previous: the fit that this one adds to, if any.
        score: gives the trace of the loss Hessian and the loss of every sample of a batch.

    Raises:
        ValueError, TypeError: as the data room says, for budgets, loaders and sizes.
    """
    if request.magnitude_loader is not None:
        return plan_from_two_loaders(
            request.train_loader,
            request.magnitude_loader,
            n_data=request.n_data,
            seed=request.seed,
            dict_key_y=request.dict_key_y,
        )
    exclude, seed = frozenset[int](), request.seed
    if previous is not None and request.n_samples is not None:
        if options.sampling is Sampling.CURVATURE:
            seed = derived_seed(request.seed, "added", previous.estimate.n_samples)
        else:
            exclude = previous.drawn
    n_folds, fractions = options.n_folds, options.fold_fractions
    if options.sampling is Sampling.CURVATURE and _is_a_share(request, exclude):
        assert request.n_samples is not None
        return plan_from_pool(
            request.train_loader,
            score,
            folds=n_folds,
            fractions=fractions,
            n_samples=request.n_samples,
            n_data=request.n_data,
            seed=seed,
            symmetric=options.scheme is Scheme.CROSS_FIT,
            pool_size=options.pool_size or max(MAX_POOL_SIZE, request.n_samples),
            dict_key_y=request.dict_key_y,
        )
    return plan_from_loader(
        request.train_loader,
        folds=n_folds,
        fractions=fractions,
        n_samples=request.n_samples,
        n_data=request.n_data,
        seed=seed,
        exclude=exclude,
        dict_key_y=request.dict_key_y,
    )


class OutputPass(Protocol):
    """Anything that gives network outputs."""

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs [m, C] without a graph."""


def _is_a_share(request: FitRequest, exclude: frozenset[int]) -> bool:
    """Whether a budget leaves anything out; if not, every sample is taken once."""
    if request.n_samples is None:
        return False
    budget, _ = checked_budget(request.train_loader, request.n_samples, request.n_data, 1)
    return budget < len(budget_pool(request.train_loader, budget, exclude))


def scorer(
    output_pass: OutputPass, loss: LossModel
) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]]:
    """Trace of the loss Hessian and loss of every sample of a batch, by a forward pass."""

    def score(inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = output_pass.outputs(inputs)
            targets = targets.to(outputs.device)
            loss.check_targets(outputs, targets)
            return loss.hessian_trace(outputs, targets), loss.losses(outputs, targets)

    return score


def fit_kron(
    plan: CurvaturePlan,
    walk: FirstWalk,
    estimator: KronEstimator | None,
    options: CurvatureOptions,
    request: FitRequest,
    names: tuple[str, ...],
    previous: FittedKron | None,
) -> FittedKron:
    """Estimate the curvature of a plan, and add it to an earlier fit if there is one.

    Added factors are means weighted by the number of draws (same N), or by N where the new data
    extend the training set. Magnitudes that came from factors follow from the merged factors;
    measured ones are averaged at equal ranks with the same weights. Draws by curvature may repeat
    samples of the earlier fit, so they are measured along directions of their own: along merged
    ones a sample could measure a direction that it has chosen before.
    """
    statistics = walk.fold_statistics(plan)
    if plan.pool is not None:
        statistics = replace(statistics, mean_loss=float(plan.pool.losses.mean()))
    if previous is None:
        estimate = joined_estimate(statistics, options, plan.fold_sizes, estimator, plan)
        drawn = drawn_indices(plan, request)
        return Fitted(estimate, plan.n_data, options.scheme, names, drawn)
    _check_can_add(previous, plan, options, names)
    same_n = request.n_samples is not None
    old_weight = previous.estimate.n_samples if same_n else previous.n_data
    new_weight = sum(plan.fold_sizes) if same_n else plan.n_data
    old, new = previous.estimate, statistics
    merged = FoldStatistics(
        tuple(
            KroneckerFactors.merge(
                [
                    replace(before, n_samples=before.n_samples * old_weight / old.n_samples),
                    replace(after, n_samples=after.n_samples * new_weight / sum(plan.fold_sizes)),
                ]
            )
            for before, after in zip(old.folds, new.factors, strict=True)
        ),
        (old_weight * old.mean_loss + new_weight * new.mean_loss) / (old_weight + new_weight),
        new.n_outputs,
        new.effective_samples,
    )
    if same_n and options.sampling is Sampling.CURVATURE:
        estimate = joined_estimate(new, options, plan.fold_sizes, estimator, plan)
        estimate = replace(
            estimate,
            basis=posterior_basis(merged, options.scheme, plan.fold_sizes),
            comparisons=old.comparisons + estimate.comparisons,
            mean_loss=merged.mean_loss,
        )
    else:
        estimate = joined_estimate(merged, options, plan.fold_sizes, estimator, plan)
    if estimator is not None:
        share = new_weight / (old_weight + new_weight)
        tables = join_by_rank([old.tables, estimate.tables], [1 - share, share])
        estimate = replace(estimate, tables=tables)
    n_samples = old.n_samples + sum(plan.fold_sizes)
    folds = tuple(
        replace(fold, n_samples=fold.n_samples * n_samples / (old_weight + new_weight))
        for fold in merged.factors
    )
    return Fitted(
        replace(estimate, n_samples=n_samples, folds=folds),
        previous.n_data if same_n else previous.n_data + plan.n_data,
        options.scheme,
        names,
        previous.drawn | drawn_indices(plan, request),
    )


def drawn_indices(plan: CurvaturePlan, request: FitRequest) -> frozenset[int]:
    """Dataset indices that a plan's budget has drawn; none without a budget."""
    if request.n_samples is None or plan.indices is None:
        return frozenset()
    return frozenset(index for fold in plan.indices for index in fold.tolist())


def _check_can_add(
    previous: FittedKron, plan: CurvaturePlan, options: CurvatureOptions, names: tuple[str, ...]
) -> None:
    if previous.scheme is not options.scheme or len(previous.estimate.folds) != len(
        plan.fold_sizes
    ):
        raise ValueError(
            f"override=False adds to a fit with scheme={previous.scheme.value!r} and "
            f"{len(previous.estimate.folds)} folds, but this one has "
            f"scheme={options.scheme.value!r} and {len(plan.fold_sizes)}."
        )
    if previous.names != names:
        raise ValueError("override=False needs the same covered parameters as the earlier fit.")
