"""A plan: which samples, in which fold, with which weight, and the walk over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_debiased.network.inputs import select_rows
from laplace_debiased.parallel import Ranks


@dataclass(frozen=True, eq=False)
class Draws:
    """Samples that were drawn, one entry per sample and fold, in the order of the walk.

    Attributes:
        folds: Fold of each sample, 0..K-1. [n] int64
        counts: How often the sample was drawn into its fold. [n] int64
        weights: w_n = 1/(M q_n) of the draw, 1 for uniform draws. [n] float64
        indices: Index in the loader's dataset, None where unknown. [n] int64
        positions: Place of each sample in the walk that these draws are a part of, ascending;
            None where they are all of it. [n] int64
    """

    folds: Tensor
    counts: Tensor
    weights: Tensor
    indices: Tensor | None = None
    positions: Tensor | None = None

    @classmethod
    def uniform(cls, folds: Tensor, indices: Tensor | None = None) -> Draws:
        """Draws of count one and weight one."""
        return cls(folds, torch.ones_like(folds), torch.ones(len(folds)).double(), indices)

    def __len__(self) -> int:
        return len(self.folds)

    def take(self, rows: Tensor, start: int = 0) -> Draws:
        """Some of the draws of a whole walk, with their positions.

        Args:
            rows: Which, ascending. [k] int64
            start: Place of the first draw in the walk over a whole plan.
        """
        return Draws(
            self.folds[rows],
            self.counts[rows],
            self.weights[rows],
            None if self.indices is None else self.indices[rows],
            rows + start,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """A mini-batch on its way into a curvature pass; the fold tensors are on the CPU.

    Attributes:
        inputs: As the loader's ``collate_fn`` gives it; for a mapping the whole mapping.
        targets: Targets. [m, ...]
        folds: Fold of each sample, 0..K-1. [m] int64
        counts: How often the sample was drawn into its fold; 1 unless drawn with replacement.
            [m] int64
        weights: w_n = 1/(M q_n), the weight of gradient terms with which a mean over draws is
            unbiased for the mean over the pool; 1 for uniform draws. [m] float64
        positions: Place of each sample in the walk over a whole plan, where this is a part of one;
            else None. [m] int64
    """

    inputs: Any
    targets: Tensor
    folds: Tensor
    counts: Tensor
    weights: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.folds)

    def select(self, rows: Tensor | slice) -> Batch:
        """Those samples; without inputs where there are none."""
        return Batch(
            None if self.inputs is None else select_rows(self.inputs, rows),
            self.targets[rows],
            self.folds[rows],
            self.counts[rows],
            self.weights[rows],
            None if self.positions is None else self.positions[rows],
        )


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


class Part(Protocol):
    """Samples that are walked."""

    @property
    def draws(self) -> Draws:
        """They, in the order of the walk."""

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples in each batch of one walk."""

    def walk(self) -> Iterator[Batch]:
        """Load the draws, in their order."""


class Source(Part, Protocol):
    """Part of a plan that knows its draws before it loads them."""

    @property
    def is_own(self) -> bool:
        """Whether every rank has other samples here."""

    def redrawn(self, draws: Draws, batch_sizes: tuple[int, ...]) -> Source:
        """The same source with other draws."""

    def share(self, ranks: Ranks, rows: Tensor, start: int) -> Part:
        """What one rank takes.

        Args:
            ranks: All ranks.
            rows: Which draws are to be shared out, ascending. [k] int64
            start: Place of the source's first draw in the plan.
        """


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank walks of a plan.

    Attributes:
        parts: Where the samples come from, one after the other.
    """

    parts: tuple[Part, ...]

    def batches(self) -> Iterator[Batch]:
        """Walk them once; see :meth:`CurvaturePlan.batches`."""
        for part in self.parts:
            yield from part.walk()

    def __len__(self) -> int:
        """Batches in one walk."""
        return sum(len(part.batch_sizes) for part in self.parts)

    @property
    def positions(self) -> Tensor:
        """Places of the samples in the walk over the whole plan. [n] int64."""
        places = [part.draws.positions for part in self.parts]
        known = [one for one in places if one is not None]
        if len(known) == len(places):
            return torch.cat(known)
        return torch.arange(sum(len(part.draws) for part in self.parts))


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
        pool: Scores of the pool for draws by curvature, else None.
        held_out_folds: Folds that are a sample of the rest of the pool given all other folds; the
            others may give directions only. None for all of them.
        distinct_sizes: Samples of each fold as they are walked: one that was drawn twice counts
            once.
        is_weighted: Whether the draws are weighted: from q ∝ curvature, with replacement in a fold.
    """

    n_data: int
    fold_sizes: tuple[int, ...]
    population: int | None
    pool_size: int | None
    unseen_mass: tuple[float, ...] | None
    indices: tuple[Tensor, ...] | None = field(repr=False)
    sources: tuple[Source, ...] = field(repr=False)
    distinct_sizes: tuple[int, ...]
    is_weighted: bool
    pool: PoolScores | None = field(default=None, repr=False)
    held_out_folds: frozenset[int] | None = None

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
        return Share(self.sources).batches()

    def __len__(self) -> int:
        """Batches in one walk."""
        return len(Share(self.sources))

    @property
    def n_folds(self) -> int:
        """Number K of folds."""
        return len(self.fold_sizes)

    @property
    def n_distinct(self) -> int:
        """Samples that are surely different ones."""
        if self.indices is None:
            return max((len(source.draws) for source in self.sources), default=0)
        return len(torch.cat(self.indices).unique())

    @property
    def n_samples(self) -> int:
        """Samples in one walk; what was drawn twice into a fold is walked once."""
        return sum(self.distinct_sizes)

    def share(self, ranks: Ranks, done: Tensor | None = None) -> Share:
        """What one rank walks; everything, where there is one.

        Args:
            ranks: All ranks.
            done: Places in the walk that nobody needs to see any more. [k] int64
        """
        if ranks.world == 1 and done is None:
            return Share(self.sources)
        parts, start = [], 0
        for source in self.sources:
            rows = torch.arange(len(source.draws))
            if done is not None:
                rows = rows[~torch.isin(rows + start, done)]
            parts.append(source.share(ranks, rows, start))
            start += len(source.draws)
        return Share(tuple(parts))

    def of_first(self, ranks: Ranks) -> CurvaturePlan:
        """Rank 0's plan, over this rank's loaders."""
        if ranks.world == 1:
            return self
        drawn = [(source.draws, source.batch_sizes) for source in self.sources]
        numbers, drawn = ranks.from_first("the plan", lambda: [replace(self, sources=()), drawn])
        sources = tuple(
            source.redrawn(*given) for source, given in zip(self.sources, drawn, strict=True)
        )
        return replace(numbers, sources=sources)


def plan_of(
    sources: tuple[Source, ...],
    *,
    n_data: int,
    n_folds: int,
    population: int | None,
    pool_size: int | None = None,
    pool: PoolScores | None = None,
    held_out_folds: frozenset[int] | None = None,
) -> CurvaturePlan:
    """Plan over ``sources`` with the sizes, masses and indices that follow from their draws.

    ``pool_size`` is the population's where it is not given.
    """
    pool_size = population if pool_size is None else pool_size
    folds, counts, weights = (
        torch.cat([getattr(source.draws, name) for source in sources])
        for name in ("folds", "counts", "weights")
    )
    sizes = torch.bincount(folds, weights=counts.double(), minlength=n_folds)
    distinct = torch.bincount(folds, minlength=n_folds)
    unseen = None
    if pool_size is not None:
        mass = torch.bincount(folds, weights=1 / (pool_size * weights), minlength=n_folds)
        # A fold that holds the whole pool leaves exactly nothing, not rounding noise.
        unseen = tuple((1 - mass).clamp(min=0).tolist())
    return CurvaturePlan(
        n_data=n_data,
        fold_sizes=tuple(int(size) for size in sizes),
        population=population,
        pool_size=pool_size,
        unseen_mass=unseen,
        indices=_fold_indices(sources, n_folds),
        sources=sources,
        distinct_sizes=tuple(distinct.tolist()),
        is_weighted=bool((weights != 1).any()),
        pool=pool,
        held_out_folds=held_out_folds,
    )


def _fold_indices(sources: tuple[Source, ...], n_folds: int) -> tuple[Tensor, ...] | None:
    known = [s.draws.indices for s in sources if s.draws.indices is not None]
    if len(known) < len(sources):
        return None
    indices, folds = torch.cat(known), torch.cat([s.draws.folds for s in sources])
    return tuple(torch.unique(indices[folds == k]) for k in range(n_folds))
