"""Draw disjoint folds with probabilities that follow curvature.

Two folds that must not share a sample cannot both be independent draws from q. What a magnitude
needs is less: given the folds that made the directions, the held-out fold must be independent
draws from q on the rest of the pool. Its known missing mass then corrects the estimate (see
``magnitude_coefficients``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GIBBS_SWEEPS = 32
"""Sweeps over the folds. In the worst case, where the draws exhaust the pool, each fold given the
others is then within 1e-4 in total variation of its exact law; in large pools a few sweeps do."""


@dataclass(frozen=True, eq=False)
class FoldDraw:
    """The draws of one fold.

    Attributes:
        positions: Distinct positions in the pool, ascending. [d] int64
        counts: How often each was drawn. [d] int64
        weights: w_n = 1/(M q_n). [d] float64
    """

    positions: Tensor
    counts: Tensor
    weights: Tensor


def sampling_probabilities(h: Tensor, epsilon: float) -> Tensor:
    """q_n = (1−ε) h_n/Σh + ε/M, so that no weight 1/(M q_n) exceeds 1/ε.

    Args:
        h: Trace of each sample's loss Hessian in the outputs. [M]
        epsilon: Share of uniform draws, in (0, 1].

    Returns:
        Probabilities, summing to one; uniform where every h is zero. [M] float64

    Raises:
        ValueError: ``h`` is empty, negative or not finite, or ``epsilon`` outside (0, 1].
    """
    if not 0 < epsilon <= 1:
        raise ValueError(
            f"epsilon must lie in (0, 1], got {epsilon}: without uniform draws a sample with h = 0 "
            "is never seen and the estimate is biased."
        )
    if h.ndim != 1 or len(h) == 0:
        raise ValueError(f"h must be a non-empty vector, got shape {tuple(h.shape)}.")
    h = h.detach().cpu().double()
    if not bool(torch.isfinite(h).all()) or bool((h < 0).any()):
        raise ValueError(
            "h, the trace of each sample's loss Hessian, must be finite and not negative; check "
            "the model's outputs for NaN."
        )
    if not bool((h > 0).any()):
        return torch.full_like(h, 1 / len(h))
    # Scaled by its largest entry first: the sum of large traces may overflow.
    share = h / h.max()
    return (1 - epsilon) * share / share.sum() + epsilon / len(h)


def draw_weighted_folds(
    h: Tensor,
    sizes: Sequence[int],
    epsilon: float,
    generator: torch.Generator,
    *,
    symmetric: bool,
    sweeps: int = GIBBS_SWEEPS,
) -> list[FoldDraw]:
    """Draw disjoint folds, with replacement within a fold.

    One after the other (``symmetric=False``): fold 0 is i.i.d. from q, each next fold i.i.d. from
    q on the complement of those before it. Only the last may then be held out.

    Symmetric: P(f_0, …, f_{K−1}) ∝ Π_k Π_{n∈f_k} q_n · 1[disjoint], under which *each* fold given
    all others is i.i.d. from q on their complement. Gibbs sweeps redraw one whole fold at a time
    from just that conditional. They start from folds drawn on a random partition of the pool, so
    that the heaviest samples are spread over the folds.

    Args:
        h: Trace of each sample's loss Hessian in the outputs. [M]
        sizes: Draws per fold; at most M in all.
        epsilon: Share of uniform draws in q, in (0, 1].
        generator: CPU generator of the draws.
        symmetric: Whether each fold will be held out in its turn.
        sweeps: Gibbs sweeps over all folds.

    Returns:
        One draw per fold, no sample in two of them.

    Raises:
        ValueError: Bad ``h`` or ``epsilon``, an empty fold, or more draws than samples.
    """
    q = sampling_probabilities(h, epsilon)
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1 each, got {tuple(sizes)}.")
    if sum(sizes) > len(q):
        raise ValueError(f"{sum(sizes)} draws exceed the pool of {len(q)} samples.")
    if symmetric and len(sizes) > 1:
        counts = _gibbs(q, sizes, generator, sweeps)
    else:
        counts = _sequential(q, sizes, generator)
    draws = []
    for count in counts:
        positions = count.nonzero().squeeze(1)
        draws.append(FoldDraw(positions, count[positions], 1 / (len(q) * q[positions])))
    return draws


def _draw(q: Tensor, allowed: Tensor, size: int, generator: torch.Generator) -> Tensor:
    # Only the support is handed over, so that rounding can never pick a sample outside it.
    support = allowed.nonzero().squeeze(1)
    picked = torch.multinomial(q[support], size, replacement=True, generator=generator)
    return torch.bincount(support[picked], minlength=len(q))


def _sequential(q: Tensor, sizes: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    counts: list[Tensor] = []
    allowed = torch.ones(len(q), dtype=torch.bool)
    for size in sizes:
        counts.append(_draw(q, allowed, size, generator))
        allowed = allowed & (counts[-1] == 0)
    return counts


def _gibbs(
    q: Tensor, sizes: Sequence[int], generator: torch.Generator, sweeps: int
) -> list[Tensor]:
    n_folds = len(sizes)
    side = torch.arange(len(q)) % n_folds
    side = side[torch.randperm(len(q), generator=generator)]
    counts = [_draw(q, side == k, sizes[k], generator) for k in range(n_folds)]
    for _ in range(sweeps):
        for k in range(n_folds):
            others = torch.stack([counts[j] for j in range(n_folds) if j != k]).sum(0)
            counts[k] = _draw(q, others == 0, sizes[k], generator)
    return counts
