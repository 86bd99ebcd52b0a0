"""Curvature sampling: score a pool with forward passes, then draw where curvature is.

Two folds that must not share a sample cannot both be independent draws from q. What a magnitude
needs is less: given the folds that made the directions, the held-out fold must be independent
draws from q on the rest of the pool. Its known missing mass then corrects the estimate (see
``magnitude_coefficients``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.data.build import Supply, fold_sizes, uniform_source
from laplace_debiased.data.plan import CurvaturePlan, PoolScores, plan_of
from laplace_debiased.data.sources import Draws
from laplace_debiased.parallel.sums import assembled

Score = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""(inputs, targets [m, ...]) -> (score s [m], loss [m]), one value per sample."""

Kept = Callable[[Tensor, Callable[[], PoolScores]], PoolScores]
"""(indices [M], makes their scores) -> their scores."""


def anew(indices: Tensor, make: Callable[[], PoolScores]) -> PoolScores:
    """Scores of which none are kept."""
    return make()


EPSILON = 0.02
"""Share of uniform draws. On a ResNet-20 the variance of a draw is .186 at .1, .146 at .05, .125 at
.02 and .119 at .01 (of the trace, relative to its square); no weight exceeds 1/ε."""

MAX_POOL_SIZE = 8_192
"""Cap on the pool: one forward pass over it is part of the fit."""

GIBBS_SWEEPS = 32
"""Sweeps over the folds. In the worst case, where the draws exhaust the pool, each fold given the
others is then within 1e-4 in total variation of its exact law; in large pools a few sweeps do."""

_DRAW_VARIANCE = 0.125
_TOLERATED = 0.25
_FEWEST, _MOST, _WHOLE = 4, 64, 32
_PILOT, _LEAST_PILOT, _LARGEST_PILOT = 4, 32, 512


def score_pool(supply: Supply, pool_indices: Tensor, score: Score) -> PoolScores:
    """Score each sample of a pool of dataset indices [M], in batches; each rank a share.

    Raises:
        ValueError: Scores are not finite.
    """
    n, ranks = len(pool_indices), supply.ranks
    folds = torch.zeros(n, dtype=torch.int64)
    source = supply.source(Draws.uniform(folds, pool_indices), "score")
    part = source if ranks.world == 1 else source.part(ranks.positions(n), ranks.rank)
    none = torch.empty(0, dtype=torch.float64)
    scored: list[tuple[Tensor, Tensor]] = [(none, none)]
    for batch in part.walk():
        found, losses = (v.detach().cpu().double() for v in score(batch.inputs, batch.targets))
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                "the trace of a loss Hessian is not finite; check the model's outputs on the "
                "training data for NaN."
            )
        scored.append((found, losses))
    own = torch.stack([torch.cat(values) for values in zip(*scored, strict=True)], dim=1)
    scores, losses = assembled(ranks, "the pool's scores", own, ranks.positions(n), n).unbind(1)
    return PoolScores(pool_indices, scores, losses)


def plan_by_curvature(
    supply: Supply,
    score: Score,
    fractions: Sequence[float],
    *,
    symmetric: bool,
    pool_size: int | None = None,
    kept: Kept = anew,
) -> CurvaturePlan:
    """Draw disjoint folds with q_n = (1−ε) s_n/Σs + ε/M from a scored pool.

    Where all scores are equal the draw is uniform and without replacement: as unbiased, less
    variable.

    Args:
        supply: The loader, looked up, with a budget: draws in all folds together, with replacement
            within a fold.
        score: Gives score s_n and loss ℓ_n of each sample of a batch; called on the whole pool.
        fractions: Shares of the folds.
        symmetric: Whether each fold will be held out in its turn (cross-fitting). Otherwise
            fold 0 is i.i.d. from q, and only the last fold may be held out.
        pool_size: Samples M of the pool, a uniform subset of what the sampler draws from; None for
            as many as the draws can use. Everything is then unbiased for that pool's mean, and what
            of the pool the directions have not seen stands for all that they have not seen.
        kept: Gives the scores of indices, from a fit that was interrupted or by what it is handed.

    Raises:
        TypeError: The loader yields neither pairs nor mappings.
        ValueError: The budget exceeds the pool, or the pool or its scores are bad.
    """
    assert supply.budget is not None

    def scored(indices: Tensor) -> PoolScores:
        return kept(indices, partial(score_pool, supply, indices, score))

    scores = scored(_pool(supply, pool_size, scored))
    sizes = fold_sizes(supply.budget, fractions)
    q = sampling_probabilities(scores.scores, EPSILON)
    if bool((q.max() - q.min()) <= 1e-9 * q.max()):
        source = uniform_source(supply, scores.indices, sizes)
    else:
        draws = draw_weighted_folds(q, sizes, supply.generator("draw"), symmetric=symmetric)
        source = supply.source(replace(draws, indices=scores.indices[draws.indices]), "walk")
    return plan_of(
        (source,),
        n_data=supply.n_data,
        n_folds=len(sizes),
        population=supply.population,
        pool_size=len(scores),
        pool=scores,
    )


def _pool(supply: Supply, pool_size: int | None, scored: Callable[[Tensor], PoolScores]) -> Tensor:
    """Dataset indices of the pool, ascending [M]: a uniform subset of the supply's.

    Where the size is chosen by scores, those belong to a pilot sample that stays out of the pool: a
    pool that stopped at its own scores would be biased towards small ones.
    """
    assert supply.pool is not None
    assert supply.budget is not None
    budget, pilot = supply.budget, 0
    if pool_size is not None:
        size = pool_size
        if size < budget:
            raise ValueError(f"pool_size={size} is smaller than n_samples={budget}: raise it.")
    elif len(supply.pool) <= _WHOLE * budget:
        return supply.pool
    order = torch.randperm(len(supply.pool), generator=supply.generator("pool"))
    if pool_size is None:
        pilot = min(max(_PILOT * budget, _LEAST_PILOT), _LARGEST_PILOT)
        tried = scored(supply.pool[order[:pilot].sort().values])
        size = useful_pool_size(tried.scores, budget, len(supply.pool) - pilot)
    return supply.pool[order[pilot : pilot + size].sort().values]


def useful_pool_size(scores: Tensor, budget: int, available: int) -> int:
    """How many of the P samples that are available to score for a budget of m draws.

    The mean of a pool of M of P samples has the relative variance (c²/M)(1 − M/P), c² the relative
    variance of one sample's curvature, known from ``scores`` [n] of some. To this the draws add
    v/m, v ≈ 1/8 the relative variance of curvature over score. A pool is large enough where it adds
    no more than a quarter to that; M is between 4·m and 64·m and not above ``MAX_POOL_SIZE`` (or m,
    if that is more).
    """
    mean, variance = float(scores.mean()), float(scores.var())
    spread = variance / mean**2 if mean > 0 else 0.0
    least = _TOLERATED * _DRAW_VARIANCE / budget
    wanted = math.ceil(1 / (least / spread + 1 / available)) if spread > 0 else 0
    most = max(min(_MOST * budget, MAX_POOL_SIZE), budget)
    return min(max(wanted, _FEWEST * budget), most, available)


def sampling_probabilities(h: Tensor, epsilon: float) -> Tensor:
    """q_n = (1−ε) h_n/Σh + ε/M [M] float64, so that no weight 1/(M q_n) exceeds 1/ε.

    Uniform where every h is zero. h [M] are traces of loss Hessians, finite and not negative;
    without the share ε in (0, 1] of uniform draws a sample with h = 0 would never be seen.
    """
    h = h.double()
    if not bool((h > 0).any()):
        return torch.full_like(h, 1 / len(h))
    # Scaled by its largest entry first: the sum of large traces may overflow.
    share = h / h.max()
    return (1 - epsilon) * share / share.sum() + epsilon / len(h)


def draw_weighted_folds(
    q: Tensor,
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    symmetric: bool,
    sweeps: int = GIBBS_SWEEPS,
) -> Draws:
    """Draw disjoint folds of ``sizes`` from q [M], with replacement within a fold.

    One after the other (``symmetric=False``): fold 0 is i.i.d. from q, each next fold i.i.d. from
    q on the complement of those before it. Only the last may then be held out.

    Symmetric: P(f_0, …, f_{K−1}) ∝ Π_k Π_{n∈f_k} q_n · 1[disjoint], under which *each* fold given
    all others is i.i.d. from q on their complement. Gibbs sweeps redraw one whole fold at a time
    from just that conditional. They start from folds drawn on a random partition of the pool, so
    that the heaviest samples are spread over the folds.

    The draws come fold by fold, with positions in the pool as their indices.
    """
    n_folds, counts = len(sizes), [torch.zeros(len(q), dtype=torch.int64) for _ in sizes]

    def draw(fold: int, allowed: Tensor) -> None:
        # Only the support is handed over, so that rounding can never pick a sample outside it.
        support = allowed.nonzero().squeeze(1)
        picked = torch.multinomial(q[support], sizes[fold], replacement=True, generator=generator)
        counts[fold] = torch.bincount(support[picked], minlength=len(q))

    if symmetric and n_folds > 1:
        side = torch.arange(len(q)) % n_folds
        side = side[torch.randperm(len(q), generator=generator)]
        for fold in range(n_folds):
            draw(fold, side == fold)
    order = [*range(n_folds)] * (sweeps if symmetric and n_folds > 1 else 1)
    for fold in order:
        counts[fold].zero_()
        draw(fold, torch.stack(counts).sum(0) == 0)
    positions = [count.nonzero().squeeze(1) for count in counts]
    where = torch.cat(positions)
    return Draws(
        torch.cat([torch.full_like(at, fold) for fold, at in enumerate(positions)]),
        torch.cat([count[at] for count, at in zip(counts, positions, strict=True)]),
        1 / (len(q) * q[where]),
        where,
    )
