"""Curvature sampling: score a pool with forward passes, then draw where curvature is."""

from __future__ import annotations

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

__all__ = ["Score", "plan_by_curvature", "plan_from_pool", "score_pool"]

Score = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
"""(inputs, targets [m, ...]) -> (h [m], loss [m]), one value per sample."""


def score_pool(
    loader: Any,
    pool_indices: Tensor,
    score: Score,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    dict_key_y: str = "labels",
) -> PoolScores:
    """Score each sample of a pool, in batches under guarded generators.

    Args:
        loader: DataLoader over a map-style dataset.
        pool_indices: Dataset indices of the pool. [M] int64
        score: Gives tr ∇²_f ℓ_n and ℓ_n of each sample of a batch.
        seed: Seed of augmentations in the dataset.
        batch_size: Samples per batch; None for the loader's own.
        dict_key_y: Key of the targets in mapping batches.

    Raises:
        ValueError: ``score`` returns a wrong shape, or h that is negative or not finite.
    """
    n = len(pool_indices)
    source = IndexedSource(
        loader,
        Draws.uniform(torch.zeros(n, dtype=torch.int64), pool_indices),
        batch_sizes(n, batch_size, loader),
        derived_seed(seed, "score"),
        dict_key_y,
    )
    scored: list[tuple[Tensor, Tensor]] = []
    for batch in source.walk():
        h, losses = (value.detach().cpu().double() for value in score(batch.inputs, batch.targets))
        if h.shape != (len(batch),) or losses.shape != (len(batch),):
            raise ValueError(
                f"score must return h and losses of shape ({len(batch)},), one per sample, got "
                f"{tuple(h.shape)} and {tuple(losses.shape)}."
            )
        if not bool(torch.isfinite(h).all()) or bool((h < 0).any()):
            raise ValueError(
                "score returned a trace of a loss Hessian that is negative or not finite; check "
                "the model's outputs on the training data for NaN."
            )
        scored.append((h, losses))
    h, losses = (torch.cat(parts) for parts in zip(*scored, strict=True))
    return PoolScores(pool_indices, h, losses)


def plan_from_pool(
    loader: Any,
    score: Score,
    *,
    folds: int,
    fractions: tuple[float, ...] | None = None,
    n_samples: int,
    n_data: int | None = None,
    seed: int = 0,
    symmetric: bool,
    epsilon: float = 0.1,
    pool_size: int | None = None,
    exclude: frozenset[int] = frozenset(),
    batch_size: int | None = None,
    dict_key_y: str = "labels",
) -> CurvaturePlan:
    """Draw disjoint folds with q_n = (1−ε) h_n/Σh + ε/M from a scored pool.

    Where all h are equal the draw is uniform and without replacement: as unbiased, less variable.

    Args:
        loader: DataLoader over a map-style dataset.
        score: Gives tr ∇²_f ℓ_n and ℓ_n of each sample of a batch; called on the whole pool.
        folds: Number K of folds.
        fractions: Share of each fold; None for equal parts.
        n_samples: Draws in all folds together, with replacement within a fold.
        n_data: Size N of the training set where it is not ``len(loader.dataset)``.
        seed: Decides the pool, the draws and augmentations.
        symmetric: Whether each fold will be held out in its turn (cross-fitting). Otherwise
            fold 0 is i.i.d. from q and only the last fold may be held out.
        epsilon: Share of uniform draws in q, in (0, 1].
        pool_size: Largest pool M, a uniform subset of what the sampler draws from. Everything is
            then unbiased for that pool's mean, and what of the pool the directions have not seen
            stands for all that they have not seen. None for no limit.
        exclude: Dataset indices not to draw.
        batch_size: Samples per batch; None for the loader's own.
        dict_key_y: Key of the targets in mapping batches.

    Raises:
        TypeError: A number is no int, or the loader yields neither pairs nor mappings.
        ValueError: The budget exceeds the pool, or the pool or its scores are bad.
    """
    n_folds = checked_integer("folds", folds)
    supply = Supply.of(
        loader, n_samples=checked_integer("n_samples", n_samples), n_data=n_data, n_folds=n_folds
    )
    return plan_by_curvature(
        supply.without(exclude),
        score,
        folds=n_folds,
        fractions=fractions,
        seed=seed,
        symmetric=symmetric,
        epsilon=epsilon,
        pool_size=pool_size,
        batch_size=batch_size,
        dict_key_y=dict_key_y,
    )


def plan_by_curvature(
    supply: Supply,
    score: Score,
    *,
    folds: int,
    fractions: tuple[float, ...] | None = None,
    seed: int = 0,
    symmetric: bool,
    epsilon: float = 0.1,
    pool_size: int | None = None,
    batch_size: int | None = None,
    dict_key_y: str = "labels",
) -> CurvaturePlan:
    """:func:`plan_from_pool` for a loader that was looked up, with a budget."""
    n_folds, seed = checked_integer("folds", folds), as_integer("seed", seed)
    shares = checked_fractions(n_folds, fractions)
    assert supply.pool is not None
    assert supply.budget is not None
    loader, pool = supply.loader, _capped(supply.pool, pool_size, supply.budget, seed)
    scores = score_pool(
        loader, pool, score, seed=seed, batch_size=batch_size, dict_key_y=dict_key_y
    )
    sizes = fold_sizes(supply.budget, n_folds, shares)
    if _is_constant(sampling_probabilities(scores.h, epsilon)):
        source = uniform_source(
            loader, pool, sizes, seed=seed, batch_size=batch_size, dict_key_y=dict_key_y
        )
        held_out = None
    else:
        draws = _weighted_draws(scores, sizes, epsilon, seed, symmetric)
        lengths = batch_sizes(len(draws), batch_size, loader)
        source = IndexedSource(loader, draws, lengths, derived_seed(seed, "walk"), dict_key_y)
        held_out = None if symmetric else frozenset({n_folds - 1})
    return plan_of(
        (source,),
        n_data=supply.n_data,
        n_folds=n_folds,
        population=max(len(pool), supply.n_data - supply.n_excluded),
        pool_size=len(pool),
        pool=scores,
        held_out_folds=held_out,
    )


def _capped(pool: Tensor, pool_size: int | None, budget: int, seed: int) -> Tensor:
    if pool_size is None:
        return pool
    size = checked_integer("pool_size", pool_size)
    if size < budget:
        raise ValueError(f"pool_size={size} is smaller than n_samples={budget}: raise it.")
    order = torch.randperm(len(pool), generator=seeded_generator(seed, "pool"))
    return pool[order[:size].sort().values]


def _is_constant(q: Tensor) -> bool:
    return bool((q.max() - q.min()) <= 1e-9 * q.max())


def _weighted_draws(
    scores: PoolScores, sizes: tuple[int, ...], epsilon: float, seed: int, symmetric: bool
) -> Draws:
    parts = draw_weighted_folds(
        scores.h, sizes, epsilon, seeded_generator(seed, "draw"), symmetric=symmetric
    )
    return Draws(
        folds=torch.cat([torch.full_like(part.positions, k) for k, part in enumerate(parts)]),
        counts=torch.cat([part.counts for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        indices=scores.indices[torch.cat([part.positions for part in parts])],
    )
