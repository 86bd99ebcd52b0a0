"""Samples that were drawn, and where they come from: a dataset with indices, or a stream."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.data.keys import Keys
from laplace_debiased.data.loaders import inner_loader, loader_generators, restartable
from laplace_debiased.network.identity import tensor_bytes
from laplace_debiased.network.inputs import select_rows
from laplace_debiased.network.rng import derived_seed, guarded_iter


@dataclass(frozen=True, eq=False)
class Draws:
    """Samples that were drawn, one entry per sample and fold, in the order of the walk.

    All tensors are on the CPU.

    Attributes:
        folds: Fold of each sample, 0..K-1. [n] int64
        counts: How often the sample was drawn into its fold; 1 unless drawn with replacement.
            [n] int64
        weights: w_n = 1/(M q_n), the weight of gradient terms with which a mean over draws is
            unbiased for the mean over the pool; 1 for uniform draws. [n] float64
        indices: Index in the loader's dataset, None where unknown. [n] int64
        positions: Place of each sample in the walk over a plan; None outside of a plan. [n] int64
    """

    folds: Tensor
    counts: Tensor
    weights: Tensor
    indices: Tensor | None = None
    positions: Tensor | None = None

    @classmethod
    def uniform(cls, folds: Tensor, indices: Tensor | None = None) -> Draws:
        """Draws of count one and weight one."""
        return Draws(folds, torch.ones_like(folds), torch.ones(len(folds)).double(), indices)

    @classmethod
    def joined(cls, parts: Sequence[Draws]) -> Draws:
        """All draws of some parts, one part after the other; None of what a part does not know."""
        values: dict[str, Any] = {}
        for name in (column.name for column in fields(Draws)):
            column = [getattr(part, name) for part in parts]
            values[name] = None if any(v is None for v in column) else torch.cat(column)
        return Draws(**values)

    def __len__(self) -> int:
        return len(self.folds)

    def select(self, rows: Tensor | slice) -> Self:
        """Those samples; without what is not there."""
        values: dict[str, Any] = {
            name: None if value is None else select_rows(value, rows)
            for name, value in vars(self).items()
        }
        return type(self)(**values)


@dataclass(frozen=True, eq=False)
class Batch(Draws):
    """A mini-batch on its way into a curvature pass.

    Attributes:
        inputs: As the loader's ``collate_fn`` gives it; for a mapping the whole mapping.
        targets: Targets. [m, ...]
    """

    inputs: Any = field(kw_only=True)
    targets: Tensor = field(kw_only=True)


@dataclass(frozen=True, eq=False)
class IndexedSource:
    """Samples of a map-style dataset, by index.

    Attributes:
        loader: The user's loader: its dataset, ``collate_fn`` and workers are used.
        draws: The samples, with their indices, in the order of the walk. [n]
        batch_sizes: Samples in each batch; they sum to n.
        seed: Seed of the augmentations.
        keys: Which entries of mapping batches are read.
    """

    loader: DataLoader
    draws: Draws
    batch_sizes: tuple[int, ...]
    seed: int
    keys: Keys
    is_own = False

    def part(self, rows: Tensor, rank: int) -> IndexedSource:
        """Some of the draws [k], ascending, in batches of the largest size that the source has."""
        size = max(self.batch_sizes)
        sizes = tuple(min(size, len(rows) - i) for i in range(0, len(rows), size))
        # Equal streams would augment the samples of all ranks alike.
        seed = derived_seed(self.seed, "rank", rank)
        return replace(self, draws=self.draws.select(rows), batch_sizes=sizes, seed=seed)

    def walk(self) -> Iterator[Batch]:
        """Load the draws, in their order."""
        assert self.draws.indices is not None
        if not self.batch_sizes:
            return
        batches = [part.tolist() for part in self.draws.indices.split(list(self.batch_sizes))]
        loaded = guarded_iter(
            lambda: inner_loader(self.loader, batches),
            self.seed,
            generators=loader_generators(self.loader),
        )
        start = 0
        for size, item in zip(self.batch_sizes, loaded, strict=True):
            inputs, targets = self.keys.split(item)
            if len(targets) != size:
                raise ValueError(
                    f"collate_fn returned {len(targets)} targets for {size} samples, so samples "
                    "cannot be told apart: use one that keeps every sample, or pass a list of "
                    "batches."
                )
            draws = self.draws.select(slice(start, start + size))
            yield Batch(**vars(draws), inputs=inputs, targets=targets)
            start += size


@dataclass(frozen=True)
class StreamRecord:
    """What one walk over a loader without indices looked like.

    Attributes:
        sizes: Samples in each batch.
        checksums: Checksum of each batch's targets.
        content: Checksum of all inputs and targets, where it was asked for.
    """

    sizes: tuple[int, ...]
    checksums: tuple[int, ...]
    content: int = 0

    @property
    def n_samples(self) -> int:
        """Samples in the walk."""
        return sum(self.sizes)


def content_checksum(value: Any, start: int = 0) -> int:
    """Checksum of all tensors and keys of a batch, going on from that of the batches before."""
    if isinstance(value, Tensor):
        return zlib.crc32(tensor_bytes(value), start)
    if isinstance(value, Mapping):
        for key, entry in value.items():
            start = content_checksum(entry, zlib.crc32(str(key).encode(), start))
    elif isinstance(value, tuple | list):
        for entry in value:
            start = content_checksum(entry, start)
    return start


def _stream(loader: Any, seed: int) -> Iterator[Any]:
    return guarded_iter(lambda: restartable(loader), seed, generators=loader_generators(loader))


def record_stream(loader: Any, seed: int, keys: Keys, *, content: bool) -> StreamRecord:
    """Walk a loader without indices once, for its batch sizes and checksums; loads all its data.

    ``content``: whether everything enters a checksum, and not the targets alone.
    """
    sizes, checksums, whole = [], [], 0
    for item in _stream(loader, seed):
        targets = keys.split(item)[1]
        sizes.append(len(targets))
        checksums.append(content_checksum(targets))
        if content:
            whole = content_checksum(item, whole)
    return StreamRecord(tuple(sizes), tuple(checksums), whole)


@dataclass(frozen=True, eq=False)
class StreamSource:
    """Samples of a loader without indices, in the order in which they come.

    Several ranks have either the same stream, or each its own; the draws [n] are those of all then,
    one stream after the other, and so are the batch sizes.

    Attributes:
        record: The walk over this rank's stream that the folds were assigned on.
        is_own: Whether every rank has a stream of its own.
        first: Which of the draws is the first of this rank's stream.
        rows: Which of the draws are taken of a stream that is walked whole, ascending; None for
            all. [k] int64
    """

    loader: Any
    draws: Draws
    batch_sizes: tuple[int, ...]
    record: StreamRecord
    seed: int
    keys: Keys
    is_own: bool
    first: int = 0
    rows: Tensor | None = None

    def part(self, rows: Tensor, rank: int) -> StreamSource:
        """Some of the draws [k], ascending: what of them is in this rank's stream."""
        rows = rows[(rows >= self.first) & (rows < self.first + self.record.n_samples)]
        ends = torch.tensor(self.record.sizes, dtype=torch.int64).cumsum(0) + self.first
        counts = torch.bincount(torch.searchsorted(ends, rows, right=True)).tolist()
        return replace(self, rows=rows, batch_sizes=tuple(filter(None, counts)))

    def walk(self) -> Iterator[Batch]:
        """Walk the loader; where it is split into folds its order must be as recorded.

        Raises:
            RuntimeError: Other samples than when the plan was made, or in another order.
        """
        if self.rows is not None and not len(self.rows):
            return
        taken = torch.zeros(len(self.draws), dtype=torch.bool)
        taken[slice(None) if self.rows is None else self.rows] = True
        # One fold is a set: it may come in any order. Several are told apart by position.
        ordered = bool((self.draws.folds != self.draws.folds[0]).any())
        known = list(zip(self.record.sizes, self.record.checksums, strict=True))
        start, last = self.first, self.first + self.record.n_samples
        for number, item in enumerate(_stream(self.loader, self.seed)):
            inputs, targets = self.keys.split(item)
            end = start + len(targets)
            seen = [(len(targets), content_checksum(targets))] if ordered else []
            if end > last or (ordered and seen != known[number : number + 1]):
                raise self._changed(number)
            draws, rows = self.draws.select(slice(start, end)), taken[start:end].nonzero()[:, 0]
            batch = Batch(**vars(draws), inputs=inputs, targets=targets)
            if len(rows):
                yield batch if len(rows) == len(batch) else batch.select(rows)
            start = end
        if start != last:
            raise self._changed(len(known))

    def _changed(self, number: int) -> RuntimeError:
        return RuntimeError(
            f"The loader changed between two walks (batch {number}), so its folds cannot be told "
            "apart: pass an unshuffled loader, or a DataLoader over a map-style dataset (its order "
            "is kept, shuffled or not), or an explicit magnitude_loader."
        )


Source = IndexedSource | StreamSource
"""Part of a plan; it knows its draws before it loads them."""
