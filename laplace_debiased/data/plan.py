"""A plan: which samples, in which fold, with which weight, and the walk over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from laplace_debiased.data.sources import Batch, Draws, Source
from laplace_debiased.parallel.ranks import Ranks


@dataclass(frozen=True, eq=False)
class PoolScores:
    """One forward pass over a pool of M samples.

    Attributes:
        indices: Dataset indices of the pool. [M] int64
        scores: What each sample is drawn in proportion to. [M] float64
        losses: Loss of each sample. [M] float64
    """

    indices: Tensor
    scores: Tensor
    losses: Tensor

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class CurvaturePlan:
    """Which samples a fit looks at, in K disjoint folds, and how to walk them.

    Attributes:
        n_data: N, size of the training set that a posterior is scaled to.
        fold_sizes: Draws per fold, the sum of counts.
        population: Size of what the draws stand for: N without the samples that were excluded,
            or all samples of one walk where they are more. None for explicit loaders, whose
            population is unknown.
        pool_size: M, size of the pool that was drawn from. It is the population, or a uniform
            sample of it: what a ``Subset``, a sampler, ``drop_last`` or a cap leaves.
        unseen_mass: Per fold Z_k = 1 − Σ q_n over the distinct samples of fold k, the probability
            of a sample outside it under one draw from the pool; None for explicit loaders.
        indices: Per fold its distinct dataset indices, ascending; None where unknown.
        sources: Where the samples come from, one after the other.
        distinct_sizes: Samples of each fold as they are walked: one that was drawn twice counts
            once.
        pool: Scores of the pool for draws by curvature, else None.
    """

    n_data: int
    fold_sizes: tuple[int, ...]
    population: int | None
    pool_size: int | None
    unseen_mass: tuple[float, ...] | None
    indices: tuple[Tensor, ...] | None = field(repr=False)
    sources: tuple[Source, ...] = field(repr=False)
    distinct_sizes: tuple[int, ...]
    pool: PoolScores | None = field(default=None, repr=False)

    def batches(self) -> Iterator[Batch]:
        """Walk all folds once.

        Each walk gives the same samples in the same order with the same augmentations, as far as
        those draw from the generators of torch, numpy or ``random``. These are restored between
        any two batches, at the end, at an early stop, and when an exception passes through.

        Yields:
            Batches; one may hold samples of several folds.

        Raises:
            RuntimeError: A loader without indices gave other samples than when the plan was made.
            ValueError: ``collate_fn`` dropped or added samples.
            TypeError: The loader yields something else than (inputs, targets) or a mapping.
        """
        for source in self.sources:
            yield from source.walk()

    def __len__(self) -> int:
        """Batches in one walk."""
        return len(self.batch_sizes)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples in each batch of one walk."""
        return tuple(size for source in self.sources for size in source.batch_sizes)

    @property
    def n_folds(self) -> int:
        """Number K of folds."""
        return len(self.fold_sizes)

    @property
    def n_samples(self) -> int:
        """Samples in one walk; what was drawn twice into a fold is walked once."""
        return sum(self.distinct_sizes)

    def share(self, ranks: Ranks, done: Tensor | None = None) -> CurvaturePlan:
        """The plan with what one rank walks of it; everything, where there is one.

        Args:
            ranks: All ranks.
            done: Places in the walk that nobody needs to see any more. [k] int64
        """
        if ranks.world == 1 and done is None:
            return self
        left = torch.arange(self.n_samples)
        if done is not None:
            left = left[~torch.isin(left, done)]
        own, parts, start = left[ranks.positions(len(left))], [], 0
        for source in self.sources:
            places, end = left if source.is_own else own, start + len(source.draws)
            rows = places[(places >= start) & (places < end)] - start
            parts.append(source.part(rows, ranks.rank))
            start = end
        return replace(self, sources=tuple(parts))

    def of_first(self, ranks: Ranks) -> CurvaturePlan:
        """Rank 0's plan, over this rank's loaders."""
        if ranks.world == 1:
            return self
        drawn = [(replace(s.draws, positions=None), s.batch_sizes) for s in self.sources]
        numbers, drawn = ranks.from_first("the plan", lambda: [replace(self, sources=()), drawn])
        sources = [
            replace(source, draws=draws, batch_sizes=sizes)
            for source, (draws, sizes) in zip(self.sources, drawn, strict=True)
        ]
        return replace(numbers, sources=_placed(sources))


def _placed(sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources with the places of their draws in the walk over all."""
    lengths = [len(source.draws) for source in sources]
    return tuple(
        replace(source, draws=replace(source.draws, positions=places))
        for source, places in zip(sources, torch.arange(sum(lengths)).split(lengths), strict=True)
    )


def plan_of(
    sources: Sequence[Source],
    *,
    n_data: int,
    n_folds: int,
    population: int | None,
    pool_size: int | None = None,
    pool: PoolScores | None = None,
) -> CurvaturePlan:
    """Plan over ``sources`` with the sizes, masses and indices that follow from their draws.

    ``pool_size`` is the population's where it is not given.
    """
    pool_size = population if pool_size is None else pool_size
    drawn = Draws.joined([source.draws for source in sources])
    folds, weights = drawn.folds, drawn.weights
    sizes = torch.bincount(folds, weights=drawn.counts.double(), minlength=n_folds)
    unseen = indices = None
    if pool_size is not None:
        mass = torch.bincount(folds, weights=1 / (pool_size * weights), minlength=n_folds)
        # A fold that holds the whole pool leaves exactly nothing, not rounding noise.
        unseen = tuple((1 - mass).clamp(min=0).tolist())
    if drawn.indices is not None:
        indices = tuple(torch.unique(drawn.indices[folds == k]) for k in range(n_folds))
    return CurvaturePlan(
        n_data=n_data,
        fold_sizes=tuple(int(size) for size in sizes),
        population=population,
        pool_size=pool_size,
        unseen_mass=unseen,
        indices=indices,
        sources=_placed(sources),
        distinct_sizes=tuple(torch.bincount(folds, minlength=n_folds).tolist()),
        pool=pool,
    )
