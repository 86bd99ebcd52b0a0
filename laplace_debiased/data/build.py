"""What a loader gives to a fit, and plans of it: everything, a uniform budget, or two batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.checks import checked_integer
from laplace_debiased.data.keys import AS_LABELLED, Keys
from laplace_debiased.data.loaders import (
    base_indices,
    check_loader,
    index_batches,
    loader_length,
    sampler_indices,
)
from laplace_debiased.data.plan import CurvaturePlan, plan_of
from laplace_debiased.data.sources import Draws, IndexedSource, Source, StreamSource, record_stream
from laplace_debiased.network.rng import derived_seed
from laplace_debiased.parallel.ranks import ALONE, Ranks

_DEFAULT_BATCH_SIZE = 128


@dataclass(frozen=True, eq=False)
class Supply:
    """A loader, how it is read, and the budget that is drawn from what is behind it.

    Attributes:
        loader: The training loader.
        n_data: N, size of the training set.
        seed: Decides draws, splits, the shuffle and augmentations.
        keys: Which entries of mapping batches are read.
        ranks: All ranks.
        budget: Samples m to draw; None for everything that one walk yields.
        pool: Dataset indices that the budget is drawn from, ascending; None without a budget.
            [M] int64
        n_excluded: How many samples were taken out of the pool.

    Raises:
        ValueError: The budget exceeds the pool.
    """

    loader: Any
    n_data: int
    seed: int = 0
    keys: Keys = AS_LABELLED
    ranks: Ranks = ALONE
    budget: int | None = None
    pool: Tensor | None = None
    n_excluded: int = 0

    @classmethod
    def of(
        cls,
        loader: Any,
        *,
        n_samples: int | None = None,
        n_data: int | None = None,
        n_folds: int = 1,
        **reading: Any,
    ) -> Supply:
        """Look a loader up; ``reading`` are ``seed``, ``keys`` and ``ranks``.

        ``n_samples`` is the budget m in all ``n_folds`` folds together, None for everything;
        ``n_data`` N where it is not ``len(loader.dataset)``.

        Raises:
            TypeError: A number is no int, or the loader cannot be walked.
            ValueError: N is unknown, not n_folds <= m <= N, or the sampler does not tell its
                indices.
        """
        check_loader(loader, "loader")
        if n_samples is None:
            return cls(loader, loader_length(loader, n_data), **reading)
        budget = checked_integer("n_samples", n_samples)
        n = loader_length(loader, n_data)
        if budget > n:
            raise ValueError(
                f"n_samples={budget} exceeds the size of the training set ({n}): lower it, or pass "
                "n_samples=None for everything."
            )
        if budget < n_folds:
            raise ValueError(f"n_samples={budget} is too few for {n_folds} folds of at least one.")
        return cls(loader, n, budget=budget, pool=sampler_indices(loader), **reading)

    def without(self, indices: frozenset[int]) -> Supply:
        """The same supply, with a budget, with samples taken out of its pool."""
        assert self.pool is not None
        taken = torch.tensor(sorted(indices), dtype=torch.int64)
        kept = self.pool[~torch.isin(self.pool, taken)]
        return replace(self, pool=kept, n_excluded=len(indices))

    def __post_init__(self) -> None:
        if self.budget is not None and self.pool is not None and self.budget > len(self.pool):
            excluded = f" after {self.n_excluded} excluded ones" if self.n_excluded else ""
            raise ValueError(
                f"n_samples={self.budget} exceeds the {len(self.pool)} samples that the loader's "
                f"sampler can give{excluded}: lower n_samples."
            )

    @property
    def population(self) -> int:
        """Size of what draws from the pool stand for: N without the samples that were excluded."""
        pool_size = 0 if self.pool is None else len(self.pool)
        return max(pool_size, self.n_data - self.n_excluded)

    def generator(self, purpose: str) -> torch.Generator:
        """CPU generator of a stream of its own for ``purpose``."""
        return torch.Generator().manual_seed(derived_seed(self.seed, purpose))

    def source(
        self, draws: Draws, purpose: str, batch_sizes: tuple[int, ...] | None = None
    ) -> IndexedSource:
        """Draws of dataset indices, by default in batches of the loader's own size."""
        if batch_sizes is None:
            sampled = getattr(self.loader.batch_sampler, "batch_size", None)
            size = self.loader.batch_size or sampled or _DEFAULT_BATCH_SIZE
            batch_sizes = tuple(min(size, len(draws) - i) for i in range(0, len(draws), size))
        seed = derived_seed(self.seed, purpose)
        return IndexedSource(self.loader, draws, batch_sizes, seed, self.keys)


def plan_from_supply(supply: Supply, fractions: Sequence[float]) -> CurvaturePlan:
    """Split a loader's samples into disjoint folds, all of them or a uniform draw.

    Without a budget everything that the loader yields in one walk is walked, in the loader's own
    batches. A loader without indices (``IterableDataset``, a list of batches, a class with its own
    ``__iter__``) is walked once here to learn its size, and its samples go to folds by position.
    Otherwise the split is random, balanced in distinct samples, and repeats of a sample share its
    fold. With a budget, samples are drawn without replacement from the indices of the loader's
    sampler and loaded with its ``collate_fn``.

    The plan's population is N (less what is excluded), of which the pool drawn from, or all samples
    of one walk, are a sample or the whole. ``fractions`` are the shares of the folds.

    Raises:
        TypeError: The loader yields no batches that split into inputs and targets.
        ValueError: The loader is empty.
    """
    n, population = supply.n_data, supply.population
    if supply.budget is not None:
        assert supply.pool is not None
        source: Source = uniform_source(supply, supply.pool, fold_sizes(supply.budget, fractions))
        pool_size = len(supply.pool)
    else:
        source = _whole_source(supply, fractions)
        pool_size = len(source.draws)
        population = max(pool_size, n)
        if isinstance(source, StreamSource) and pool_size > n:
            warnings.warn(
                f"one walk through the loader gives {pool_size} samples, more than the training "
                f"set has (N={n}): a copy of a sample may measure the directions that it chose. "
                "With an IterableDataset and several workers, let every worker yield a share of "
                "its own (torch.utils.data.get_worker_info); otherwise correct n_data.",
                UserWarning,
                stacklevel=3,
            )
    return plan_of(
        (source,), n_data=n, n_folds=len(fractions), population=population, pool_size=pool_size
    )


def plan_from_two_loaders(
    loader: Any,
    magnitude_loader: Any,
    *,
    n_data: int | None = None,
    seed: int = 0,
    keys: Keys = AS_LABELLED,
    ranks: Ranks = ALONE,
) -> CurvaturePlan:
    """Walk two loaders whole: fold 0 is ``loader`` (B), fold 1 ``magnitude_loader`` (B̃).

    They are samples of an unknown population (``population=None``); ``n_data``, the size N of the
    training set, may be None if both share one ``.dataset``. Shared samples, which bring the bias
    of a single batch back, are warned of.

    Raises:
        TypeError: A loader cannot be walked or yields no batches that split into inputs and
            targets, or ``n_data`` is no int.
        ValueError: A loader is empty, or N is unknown.
    """
    both = {"loader": loader, "magnitude_loader": magnitude_loader}
    for name, one in both.items():
        check_loader(one, name)
    shared = getattr(loader, "dataset", None)
    if n_data is None and (
        shared is None or shared is not getattr(magnitude_loader, "dataset", None)
    ):
        raise ValueError(
            "The size of the training set is unknown: pass n_data (loader and magnitude_loader do "
            "not share one .dataset)."
        )
    n, sources = loader_length(loader, n_data), []
    for fold, (name, one) in enumerate(both.items()):
        supply = Supply(one, n, derived_seed(seed, name), keys, ranks)
        source = _whole_source(supply, (1.0,), name)
        folds = torch.full_like(source.draws.folds, fold)
        sources.append(replace(source, draws=replace(source.draws, folds=folds)))
    overlap = _overlap(*sources)
    if overlap:
        warnings.warn(
            f"loader and magnitude_loader share {overlap} samples: magnitudes measured on samples "
            "that also gave the directions are biased. Use disjoint loaders.",
            UserWarning,
            stacklevel=2,
        )
    return plan_of(sources, n_data=n, n_folds=2, population=None)


def _overlap(one: Source, other: Source) -> int:
    """Count the distinct samples that two sources share, through nested ``Subset``s too.

    Loaders without indices share what one walk gives where they are one object or have one
    ``.dataset``; otherwise nothing is known of them and the count is 0.
    """
    if one.draws.indices is not None and other.draws.indices is not None:
        base, indices = base_indices(one.loader.dataset, one.draws.indices)
        other_base, other_indices = base_indices(other.loader.dataset, other.draws.indices)
        if base is not other_base:
            return 0
        return int(torch.isin(torch.unique(indices), other_indices).sum())
    dataset = getattr(one.loader, "dataset", None)
    same = one.loader is other.loader or (
        dataset is not None and dataset is getattr(other.loader, "dataset", None)
    )
    return min(len(one.draws), len(other.draws)) if same else 0


def uniform_source(supply: Supply, pool: Tensor, sizes: Sequence[int]) -> IndexedSource:
    """Draw folds of ``sizes`` from the ``pool`` [M] of dataset indices without replacement."""
    order = torch.randperm(len(pool), generator=supply.generator("draw"))
    folds = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return supply.source(Draws.uniform(folds, pool[order[: sum(sizes)]]), "walk")


def _whole_source(supply: Supply, fractions: Sequence[float], name: str = "loader") -> Source:
    """Everything that one walk yields, split into folds."""
    batches = index_batches(supply.loader, derived_seed(supply.seed, "list"))
    if batches is None:
        return _stream_source(supply, fractions, name)
    indices = torch.tensor([i for batch in batches for i in batch], dtype=torch.int64)
    if not len(indices):
        raise ValueError(
            f"{name} is empty: it yields no samples (drop_last on a small dataset drops them all)."
        )
    # Equal indices belong to the same fold.
    distinct, inverse = torch.unique(indices, return_inverse=True)
    sizes = torch.tensor(fold_sizes(len(distinct), fractions))
    fold_of = torch.empty_like(distinct)
    order = torch.randperm(len(distinct), generator=supply.generator("folds"))
    fold_of[order] = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    lengths = tuple(len(batch) for batch in batches if batch)
    return supply.source(Draws.uniform(fold_of[inverse], indices), "walk", lengths)


def _stream_source(supply: Supply, fractions: Sequence[float], name: str) -> StreamSource:
    """A loader without indices: the same on all ranks, or one after the other's."""
    seed, keys, ranks = derived_seed(supply.seed, "walk"), supply.keys, supply.ranks
    record = record_stream(supply.loader, seed, keys, content=ranks.world > 1)
    records = ranks.gathered(f"the stream of {name}", record)
    if all(other == record for other in records):
        records = [record]
    sizes = tuple(size for one in records for size in one.sizes if size)
    if not sizes:
        raise ValueError(f"{name} is empty: it yields no samples.")
    draws = Draws.uniform(interleaved_folds(fold_sizes(sum(sizes), fractions)))
    # Also where one rank has all samples, and the others' streams are empty.
    is_own = len(records) > 1
    first = sum(one.n_samples for one in records[: ranks.rank]) if is_own else 0
    return StreamSource(supply.loader, draws, sizes, record, seed, keys, is_own, first)


def fold_sizes(n: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """Sizes of the folds of ``n`` samples: at least 1 each, n in all.

    ``fractions`` are their shares; of equal ones the sizes differ by at most one.

    Raises:
        ValueError: Fewer samples than folds.
    """
    folds = range(len(fractions))
    if n < len(folds):
        raise ValueError(
            f"{n} sample(s) cannot be split into {len(folds)} folds of at least one: raise "
            "n_samples, use fewer folds, or scheme='single'."
        )
    sizes = [int(n * share) for share in fractions]
    # Largest remainders first, so that rounding never moves a fold by a whole sample.
    order = sorted(folds, key=lambda k: sizes[k] - n * fractions[k])
    for k in order[: n - sum(sizes)]:
        sizes[k] += 1
    for k in folds:
        if sizes[k] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[k] = 1
    return tuple(sizes)


def interleaved_folds(sizes: Sequence[int]) -> Tensor:
    """Folds [n] of a stream's n samples by position, spread evenly; equal ones in turn. int64."""
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    times = torch.cat([(torch.arange(size).double() + 0.5) / size for size in sizes])
    return labels[torch.argsort(times, stable=True)]
