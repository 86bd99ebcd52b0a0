"""Build plans from loaders: everything, a budget, or two explicit batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.checks import as_integer, checked_fractions, checked_integer
from laplace_debiased.data.folds import fold_sizes, interleaved_folds, random_folds
from laplace_debiased.data.loaders import (
    base_indices,
    check_loader,
    index_batches,
    loader_length,
)
from laplace_debiased.data.plan import CurvaturePlan, Draws, Source, plan_of
from laplace_debiased.data.sources import IndexedSource, StreamSource, record_stream
from laplace_debiased.data.supply import Supply
from laplace_debiased.network.rng import derived_seed
from laplace_debiased.parallel import ALONE, Ranks

_DEFAULT_BATCH_SIZE = 128


def plan_from_supply(
    supply: Supply,
    *,
    folds: int,
    fractions: tuple[float, ...] | None = None,
    seed: int = 0,
    dict_key_y: str = "labels",
    ranks: Ranks = ALONE,
) -> CurvaturePlan:
    """Split a loader's samples into disjoint folds, all of them or a uniform draw.

    Without a budget everything that the loader yields in one walk is walked, in the loader's own
    batches. A loader without indices (``IterableDataset``, a list of batches, a class with its own
    ``__iter__``) is walked once here to learn its size, and its samples go to folds by position.
    Otherwise the split is random, balanced in distinct samples, and repeats of a sample share its
    fold. With a budget, samples are drawn without replacement from the indices of the loader's
    sampler and loaded with its ``collate_fn``.

    Args:
        supply: The loader, looked up.
        folds: Number K of folds: 1 for one batch, 2 for directions and magnitudes, more to
            cross-fit.
        fractions: Share of each fold; None for equal parts, which differ by at most one.
        seed: Decides draws, splits, the shuffle and augmentations.
        dict_key_y: Key of the targets in mapping batches.
        ranks: All ranks.

    Returns:
        The plan. Its population is N (less what is excluded), of which the pool drawn from, or all
        samples of one walk, are a sample or the whole.

    Raises:
        TypeError: A number is no int, or the loader yields no batches that split into inputs and
            targets.
        ValueError: The loader is empty.

    Warns:
        UserWarning: A stream gives more samples than the training set has.
    """
    n_folds, seed = checked_integer("folds", folds), as_integer("seed", seed)
    shares = checked_fractions(n_folds, fractions)
    if supply.budget is None:
        split = _split_into(n_folds, shares)
        return _whole_plan(supply, split, n_folds, seed, dict_key_y, ranks)
    assert supply.pool is not None
    source = uniform_source(
        supply.loader,
        supply.pool,
        fold_sizes(supply.budget, n_folds, shares),
        seed=seed,
        dict_key_y=dict_key_y,
    )
    return plan_of(
        (source,),
        n_data=supply.n_data,
        n_folds=n_folds,
        population=supply.population,
        pool_size=len(supply.pool),
    )


def _whole_plan(
    supply: Supply,
    split: _Split,
    n_folds: int,
    seed: int,
    dict_key_y: str,
    ranks: Ranks,
) -> CurvaturePlan:
    """Everything that one walk yields."""
    n = supply.n_data
    source = _whole_source(supply.loader, split, seed, dict_key_y, ranks)
    walked = len(source.draws)
    if isinstance(source, StreamSource) and walked > n:
        warnings.warn(
            f"one walk through the loader gives {walked} samples, more than the training set "
            f"has (N={n}): a copy of a sample may measure the directions that it chose. With "
            "an IterableDataset and several workers, let every worker yield a share of its "
            "own (torch.utils.data.get_worker_info); otherwise correct n_data.",
            UserWarning,
            stacklevel=4,
        )
    return plan_of(
        (source,), n_data=n, n_folds=n_folds, population=max(walked, n), pool_size=walked
    )


def plan_from_two_loaders(
    loader: Any,
    magnitude_loader: Any,
    *,
    n_data: int | None = None,
    seed: int = 0,
    dict_key_y: str = "labels",
    ranks: Ranks = ALONE,
) -> CurvaturePlan:
    """Walk two loaders whole: fold 0 is ``loader`` (B), fold 1 ``magnitude_loader`` (B̃).

    Args:
        loader: Loader of the directions' batch.
        magnitude_loader: Loader of the magnitudes' batch.
        n_data: Size N of the training set; may be None if both loaders share one ``.dataset``.
        seed: Decides shuffles and augmentations.
        dict_key_y: Key of the targets in mapping batches.
        ranks: All ranks.

    Returns:
        A plan whose folds are samples of an unknown population (``population=None``).

    Raises:
        TypeError: A loader cannot be walked or yields no batches that split into inputs and
            targets, or ``n_data`` is no int.
        ValueError: A loader is empty, or N is unknown.

    Warns:
        UserWarning: The loaders share samples, which brings the bias of a single batch back.
    """
    check_loader(loader, "loader")
    check_loader(magnitude_loader, "magnitude_loader")
    seed = as_integer("seed", seed)
    shared = getattr(loader, "dataset", None)
    if n_data is None and (
        shared is None or shared is not getattr(magnitude_loader, "dataset", None)
    ):
        raise ValueError(
            "The size of the training set is unknown: pass n_data (loader and magnitude_loader do "
            "not share one .dataset)."
        )
    n = loader_length(loader, n_data)
    both = ((loader, "loader"), (magnitude_loader, "magnitude_loader"))
    sources = tuple(
        _whole_source(one, _one_fold(k), derived_seed(seed, name), dict_key_y, ranks, name)
        for k, (one, name) in enumerate(both)
    )
    overlap = batches_overlap(loader, sources[0].draws, magnitude_loader, sources[1].draws)
    if overlap:
        warnings.warn(
            f"loader and magnitude_loader share {overlap} samples: magnitudes measured on samples "
            "that also gave the directions are biased. Use disjoint loaders.",
            UserWarning,
            stacklevel=2,
        )
    return plan_of(sources, n_data=n, n_folds=2, population=None)


def batches_overlap(loader: Any, draws: Draws, other_loader: Any, other: Draws) -> int:
    """Count the distinct samples that two sets of draws share, through nested ``Subset``s too.

    Loaders without indices share what one walk gives where they are one object or have one
    ``.dataset``; otherwise nothing is known of them and the count is 0.
    """
    if draws.indices is not None and other.indices is not None:
        base, indices = base_indices(loader.dataset, draws.indices)
        other_base, other_indices = base_indices(other_loader.dataset, other.indices)
        if base is not other_base:
            return 0
        return int(torch.isin(torch.unique(indices), other_indices).sum())
    dataset = getattr(loader, "dataset", None)
    same = loader is other_loader or (
        dataset is not None and dataset is getattr(other_loader, "dataset", None)
    )
    return min(len(draws), len(other)) if same else 0


def uniform_source(
    loader: Any,
    pool: Tensor,
    sizes: Sequence[int],
    *,
    seed: int,
    dict_key_y: str,
) -> IndexedSource:
    """Draw folds of ``sizes`` from the ``pool`` [M] of dataset indices without replacement."""
    order = torch.randperm(len(pool), generator=seeded_generator(seed, "draw"))
    folds = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return IndexedSource(
        loader,
        Draws.uniform(folds, pool[order[: sum(sizes)]]),
        batch_sizes(sum(sizes), loader),
        derived_seed(seed, "walk"),
        dict_key_y,
    )


def batch_sizes(n: int, loader: Any) -> tuple[int, ...]:
    """Cut n samples into batches of the loader's own size."""
    sampled = getattr(loader.batch_sampler, "batch_size", None)
    size = loader.batch_size or sampled or _DEFAULT_BATCH_SIZE
    return tuple(min(size, n - start) for start in range(0, n, size))


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """CPU generator of a stream of its own for ``purpose``."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose))


# Folds of a walk: (dataset indices [n] or None, length n, seed) -> folds [n].
_Split = Callable[[Tensor | None, int, int], Tensor]


def _one_fold(fold: int) -> _Split:
    return lambda indices, n, seed: torch.full((n,), fold)


def _split_into(n_folds: int, shares: tuple[float, ...] | None) -> _Split:
    def split(indices: Tensor | None, n: int, seed: int) -> Tensor:
        if indices is None:
            return interleaved_folds(fold_sizes(n, n_folds, shares), equal=shares is None)
        sizes = fold_sizes(len(torch.unique(indices)), n_folds, shares)
        return random_folds(indices, sizes, seeded_generator(seed, "folds"))

    return split


def _whole_source(
    loader: Any,
    split: _Split,
    seed: int,
    dict_key_y: str,
    ranks: Ranks,
    name: str = "loader",
) -> Source:
    walk_seed = derived_seed(seed, "walk")
    batches = index_batches(loader, derived_seed(seed, "list"))
    if batches is None:
        return _stream_source(loader, split, seed, dict_key_y, ranks, name)
    indices = torch.tensor([i for batch in batches for i in batch], dtype=torch.int64)
    if not len(indices):
        raise ValueError(
            f"{name} is empty: it yields no samples (drop_last on a small dataset drops them all)."
        )
    sizes = tuple(len(batch) for batch in batches if batch)
    draws = Draws.uniform(split(indices, len(indices), seed), indices)
    return IndexedSource(loader, draws, sizes, walk_seed, dict_key_y)


def _stream_source(
    loader: Any, split: _Split, seed: int, dict_key_y: str, ranks: Ranks, name: str
) -> StreamSource:
    """A loader without indices: the same on all ranks, or one after the other's."""
    walk_seed = derived_seed(seed, "walk")
    record = record_stream(loader, walk_seed, dict_key_y, content=ranks.world > 1)
    records = ranks.gathered(f"the stream of {name}", record)
    if all(other == record for other in records):
        records = [record]
    sizes = tuple(size for one in records for size in one.sizes)
    if not sum(sizes):
        raise ValueError(f"{name} is empty: it yields no samples.")
    draws = Draws.uniform(split(None, sum(sizes), seed))
    first = sum(one.n_samples for one in records[: ranks.rank]) if len(records) > 1 else 0
    return StreamSource(loader, draws, sizes, record, walk_seed, dict_key_y, first)
