"""Curvature sampling: score a pool with forward passes, then draw where curvature is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.checks import as_integer, checked_fractions, checked_integer
from laplace_debiased.data.build import (
    batch_sizes,
    seeded_generator,
    uniform_source,
)
from laplace_debiased.data.folds import fold_sizes
from laplace_debiased.data.plan import CurvaturePlan, Draws, PoolScores, plan_of
from laplace_debiased.data.sources import IndexedSource
from laplace_debiased.data.supply import Supply
from laplace_debiased.data.weighted import draw_weighted_folds, sampling_probabilities
from laplace_debiased.network.rng import derived_seed
from laplace_debiased.parallel import ALONE, Ranks, assembled

Score = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""(inputs, targets [m, ...]) -> (score s [m], loss [m]), one value per sample."""

Kept = Callable[[Tensor, Callable[[], PoolScores]], PoolScores]
"""(indices [M], makes their scores) -> their scores."""

EPSILON = 0.02
"""Share of uniform draws. On a ResNet-20 the variance of a draw is .186 at .1, .146 at .05, .125 at
.02 and .119 at .01 (of the trace, relative to its square); no weight exceeds 1/ε."""

MAX_POOL_SIZE = 8_192
"""Cap on the pool: one forward pass over it is part of the fit."""

_DRAW_VARIANCE = 0.125
_TOLERATED = 0.25
_FEWEST, _MOST, _WHOLE = 4, 64, 32
_PILOT, _LEAST_PILOT, _LARGEST_PILOT = 4, 32, 512


def _scored_anew(indices: Tensor, score: Callable[[], PoolScores]) -> PoolScores:
    return score()


def score_pool(
    loader: Any,
    pool_indices: Tensor,
    score: Score,
    *,
    seed: int = 0,
    dict_key_y: str = "labels",
    ranks: Ranks = ALONE,
) -> PoolScores:
    """Score each sample of a pool, in batches under guarded generators; each rank a share.

    Args:
        loader: DataLoader over a map-style dataset.
        pool_indices: Dataset indices of the pool. [M] int64
        score: Gives s_n and ℓ_n of each sample of a batch.
        seed: Seed of augmentations in the dataset.
        dict_key_y: Key of the targets in mapping batches.
        ranks: All ranks.

    Raises:
        ValueError: ``score`` returns a wrong shape, or scores that are negative or not finite.
    """
    n = len(pool_indices)
    source = IndexedSource(
        loader,
        Draws.uniform(torch.zeros(n, dtype=torch.int64), pool_indices),
        batch_sizes(n, loader),
        derived_seed(seed, "score"),
        dict_key_y,
    )
    part = source if ranks.world == 1 else source.share(ranks, torch.arange(n), 0)
    none = torch.empty(0, dtype=torch.float64)
    scored: list[tuple[Tensor, Tensor]] = [(none, none)]
    for batch in part.walk():
        found, losses = (v.detach().cpu().double() for v in score(batch.inputs, batch.targets))
        if found.shape != (len(batch),) or losses.shape != (len(batch),):
            raise ValueError(
                f"score must return scores and losses of shape ({len(batch)},), one per sample; "
                f"got {tuple(found.shape)} and {tuple(losses.shape)}."
            )
        if not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
            raise ValueError(
                "score returned a trace of a loss Hessian that is negative or not finite; check "
                "the model's outputs on the training data for NaN."
            )
        scored.append((found, losses))
    own = torch.stack([torch.cat(values) for values in zip(*scored, strict=True)], dim=1)
    scores, losses = assembled(ranks, "the pool's scores", own, ranks.positions(n), n).unbind(1)
    return PoolScores(pool_indices, scores, losses)


def plan_by_curvature(
    supply: Supply,
    score: Score,
    *,
    folds: int,
    fractions: tuple[float, ...] | None = None,
    seed: int = 0,
    symmetric: bool,
    epsilon: float = EPSILON,
    pool_size: int | None = None,
    dict_key_y: str = "labels",
    ranks: Ranks = ALONE,
    kept: Kept = _scored_anew,
) -> CurvaturePlan:
    """Draw disjoint folds with q_n = (1−ε) s_n/Σs + ε/M from a scored pool.

    Where all scores are equal the draw is uniform and without replacement: as unbiased, less
    variable.

    Args:
        supply: The loader, looked up, with a budget: draws in all folds together, with replacement
            within a fold.
        score: Gives score s_n and loss ℓ_n of each sample of a batch; called on the whole pool.
        folds: Number K of folds.
        fractions: Share of each fold; None for equal parts.
        seed: Decides the pool, the draws and augmentations.
        symmetric: Whether each fold will be held out in its turn (cross-fitting). Otherwise
            fold 0 is i.i.d. from q and only the last fold may be held out.
        epsilon: Share of uniform draws in q, in (0, 1].
        pool_size: Samples M of the pool, a uniform subset of what the sampler draws from; None for
            as many as the draws can use, see :func:`useful_pool_size`. Everything is then unbiased
            for that pool's mean, and what of the pool the directions have not seen stands for all
            that they have not seen.
        dict_key_y: Key of the targets in mapping batches.
        ranks: All ranks.
        kept: Gives the scores of indices, from a fit that was interrupted or by what it is handed.

    Raises:
        TypeError: A number is no int, or the loader yields neither pairs nor mappings.
        ValueError: The budget exceeds the pool, or the pool or its scores are bad.
    """
    n_folds, seed = checked_integer("folds", folds), as_integer("seed", seed)
    shares = checked_fractions(n_folds, fractions)
    assert supply.budget is not None
    loader = supply.loader

    def scored(indices: Tensor) -> PoolScores:
        return kept(
            indices,
            lambda: score_pool(
                loader, indices, score, seed=seed, dict_key_y=dict_key_y, ranks=ranks
            ),
        )

    scores = scored(_pool(supply, pool_size, seed, scored))
    sizes = fold_sizes(supply.budget, n_folds, shares)
    if _is_constant(sampling_probabilities(scores.scores, epsilon)):
        source = uniform_source(loader, scores.indices, sizes, seed=seed, dict_key_y=dict_key_y)
        held_out = None
    else:
        draws = _weighted_draws(scores, sizes, epsilon, seed, symmetric)
        lengths = batch_sizes(len(draws), loader)
        source = IndexedSource(loader, draws, lengths, derived_seed(seed, "walk"), dict_key_y)
        held_out = None if symmetric else frozenset({n_folds - 1})
    return plan_of(
        (source,),
        n_data=supply.n_data,
        n_folds=n_folds,
        population=supply.population,
        pool_size=len(scores),
        pool=scores,
        held_out_folds=held_out,
    )


def _pool(
    supply: Supply, pool_size: int | None, seed: int, scored: Callable[[Tensor], PoolScores]
) -> Tensor:
    """Dataset indices of the pool, ascending [M]: a uniform subset of the supply's.

    Where the size is chosen by scores, those belong to a pilot sample that stays out of the pool: a
    pool that stopped at its own scores would be biased towards small ones.
    """
    assert supply.pool is not None
    assert supply.budget is not None
    budget, pilot = supply.budget, 0
    if pool_size is not None:
        size = checked_integer("pool_size", pool_size)
        if size < budget:
            raise ValueError(f"pool_size={size} is smaller than n_samples={budget}: raise it.")
    elif len(supply.pool) <= _WHOLE * budget:
        return supply.pool
    order = torch.randperm(len(supply.pool), generator=seeded_generator(seed, "pool"))
    if pool_size is None:
        pilot = min(max(_PILOT * budget, _LEAST_PILOT), _LARGEST_PILOT)
        tried = scored(supply.pool[order[:pilot].sort().values])
        size = useful_pool_size(tried.scores, budget, len(supply.pool) - pilot)
    return supply.pool[order[pilot : pilot + size].sort().values]


def useful_pool_size(scores: Tensor, budget: int, available: int) -> int:
    """How many samples of a population to score for a budget of m draws.

    The mean of a pool of M of P samples has the relative variance (c²/M)(1 − M/P), c² the relative
    variance of one sample's curvature, known from scores. To this the draws add v/m, v ≈ 1/8 the
    relative variance of curvature over score. A pool is large enough where it adds no more than a
    quarter to that.

    Args:
        scores: Scores of some samples. [n]
        budget: m.
        available: P.

    Returns:
        M, between 4·m and 64·m and not above ``MAX_POOL_SIZE`` (or m, if that is more).
    """
    mean, variance = float(scores.mean()), float(scores.var())
    spread = variance / mean**2 if mean > 0 else 0.0
    least = _TOLERATED * _DRAW_VARIANCE / budget
    wanted = math.ceil(1 / (least / spread + 1 / available)) if spread > 0 else 0
    most = max(min(_MOST * budget, MAX_POOL_SIZE), budget)
    return min(max(wanted, _FEWEST * budget), most, available)


def _is_constant(q: Tensor) -> bool:
    return bool((q.max() - q.min()) <= 1e-9 * q.max())


def _weighted_draws(
    scores: PoolScores, sizes: tuple[int, ...], epsilon: float, seed: int, symmetric: bool
) -> Draws:
    parts = draw_weighted_folds(
        scores.scores, sizes, epsilon, seeded_generator(seed, "draw"), symmetric=symmetric
    )
    return Draws(
        folds=torch.cat([torch.full_like(part.positions, k) for k, part in enumerate(parts)]),
        counts=torch.cat([part.counts for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        indices=scores.indices[torch.cat([part.positions for part in parts])],
    )
