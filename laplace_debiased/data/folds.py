"""Split samples into folds: pure functions of sizes and a generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fold_sizes(n: int, folds: int, fractions: Sequence[float] | None = None) -> tuple[int, ...]:
    """Sizes of the folds of ``n`` samples: at least 1 each, n in all.

    Args:
        n: Samples to split.
        folds: Number of folds.
        fractions: Share of each fold; None for equal parts, which differ by at most one.

    Raises:
        ValueError: Fewer samples than folds.
    """
    if n < folds:
        raise ValueError(
            f"{n} sample(s) cannot be split into {folds} folds of at least one: raise n_samples, "
            "use fewer folds, or scheme='single'."
        )
    if fractions is None:
        return tuple(n // folds + (k < n % folds) for k in range(folds))
    sizes = [int(n * share) for share in fractions]
    # Largest remainders first, so that rounding never moves a fold by a whole sample.
    order = sorted(range(folds), key=lambda k: sizes[k] - n * fractions[k])
    for k in order[: n - sum(sizes)]:
        sizes[k] += 1
    for k in range(folds):
        if sizes[k] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[k] = 1
    return tuple(sizes)


def random_folds(indices: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Assign samples to folds at random, equal indices to the same fold.

    Args:
        indices: Dataset indices, repeats allowed. [n] int64
        sizes: Distinct samples per fold; they sum to the number of distinct indices.
        generator: Decides the split.

    Returns:
        Fold of each entry of ``indices``. [n] int64
    """
    distinct, inverse = torch.unique(indices, return_inverse=True)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    fold_of = torch.empty_like(distinct)
    fold_of[torch.randperm(len(distinct), generator=generator)] = labels
    return fold_of[inverse]


def interleaved_folds(sizes: Sequence[int], *, equal: bool) -> Tensor:
    """Assign a stream to folds by position, spread evenly over the stream.

    Args:
        sizes: Samples per fold, n in all.
        equal: Whether the folds are equal parts; then sample i goes to fold i mod K.

    Returns:
        Fold of each position. [n] int64
    """
    n = sum(sizes)
    if equal:
        return torch.arange(n) % len(sizes)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    times = torch.cat([(torch.arange(size).double() + 0.5) / size for size in sizes])
    return labels[torch.argsort(times, stable=True)]
