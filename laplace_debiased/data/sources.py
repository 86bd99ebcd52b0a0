"""Where a plan's samples come from: a dataset with indices, or a stream of batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_debiased.data.loaders import (
    inner_loader,
    loader_generators,
    restartable,
    split_batch,
)
from laplace_debiased.data.plan import Batch, Draws
from laplace_debiased.network.identity import tensor_bytes
from laplace_debiased.network.rng import derived_seed, guarded_iter
from laplace_debiased.parallel import Ranks


def _batch(inputs: Any, targets: Tensor, draws: Draws, start: int) -> Batch:
    rows = slice(start, start + len(targets))
    return Batch(
        inputs,
        targets,
        draws.folds[rows],
        draws.counts[rows],
        draws.weights[rows],
        None if draws.positions is None else draws.positions[rows],
    )


@dataclass(frozen=True, eq=False)
class IndexedSource:
    """Samples of a map-style dataset, by index.

    Attributes:
        loader: The user's loader: its dataset, ``collate_fn`` and workers are used.
        draws: The samples, with their indices. [n]
        batch_sizes: Samples in each batch; they sum to n.
        seed: Seed of the augmentations.
        dict_key_y: Key of the targets in mapping batches.
    """

    loader: DataLoader
    draws: Draws
    batch_sizes: tuple[int, ...]
    seed: int
    dict_key_y: str

    @property
    def is_own(self) -> bool:
        """All ranks have the dataset."""
        return False

    def redrawn(self, draws: Draws, batch_sizes: tuple[int, ...]) -> IndexedSource:
        """The same source with other draws."""
        return replace(self, draws=draws, batch_sizes=batch_sizes)

    def share(self, ranks: Ranks, rows: Tensor, start: int) -> IndexedSource:
        """Every world-th sample, in batches of the largest size that the source has."""
        rows, size = rows[ranks.positions(len(rows), start)], max(self.batch_sizes)
        sizes = tuple(min(size, len(rows) - i) for i in range(0, len(rows), size))
        # Equal streams would augment the samples of all ranks alike.
        seed = derived_seed(self.seed, "rank", ranks.rank)
        return replace(self, draws=self.draws.take(rows, start), batch_sizes=sizes, seed=seed)

    def walk(self) -> Iterator[Batch]:
        """Load the draws, in their order."""
        if self.draws.indices is None:
            raise ValueError("IndexedSource needs draws with indices, got draws without.")
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
            inputs, targets = split_batch(item, self.dict_key_y)
            if len(targets) != size:
                raise ValueError(
                    f"collate_fn returned {len(targets)} targets for {size} samples, so samples "
                    "cannot be told apart: use one that keeps every sample, or pass a list of "
                    "batches."
                )
            yield _batch(inputs, targets, self.draws, start)
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


def record_stream(loader: Any, seed: int, dict_key_y: str, *, content: bool) -> StreamRecord:
    """Walk a loader without indices once, for its batch sizes and checksums; loads all its data.

    Args:
        loader: The loader.
        seed: Seed of a shuffle and of augmentations in it.
        dict_key_y: Key of the targets in mapping batches.
        content: Whether everything enters a checksum, and not the targets alone.

    Raises:
        ValueError: A batch lacks its targets.
        TypeError: A batch is neither a pair nor a mapping.
    """
    sizes, checksums, whole = [], [], 0
    for item in _stream(loader, seed):
        targets = split_batch(item, dict_key_y)[1]
        sizes.append(len(targets))
        checksums.append(content_checksum(targets))
        if content:
            whole = content_checksum(item, whole)
    return StreamRecord(tuple(sizes), tuple(checksums), whole)


@dataclass(frozen=True, eq=False)
class StreamSource:
    """Samples of a loader without indices, in the order in which they come.

    Several ranks have either the same stream, or each its own; the draws are those of all then,
    one stream after the other.

    Attributes:
        loader: The user's loader or iterable of batches.
        draws: The samples. [n]
        batch_sizes: Samples in each batch; they sum to n.
        record: The walk over this rank's stream that the folds were assigned on.
        seed: Seed of a shuffle and of augmentations in the loader.
        dict_key_y: Key of the targets in mapping batches.
        first: Which of the draws is the first of this rank's stream.
    """

    loader: Any
    draws: Draws
    batch_sizes: tuple[int, ...]
    record: StreamRecord
    seed: int
    dict_key_y: str
    first: int = 0

    @property
    def is_own(self) -> bool:
        """Whether every rank has a stream of its own."""
        return self.record.n_samples < len(self.draws)

    def redrawn(self, draws: Draws, batch_sizes: tuple[int, ...]) -> StreamSource:
        """The same source with other draws."""
        return replace(self, draws=draws, batch_sizes=batch_sizes)

    def share(self, ranks: Ranks, rows: Tensor, start: int) -> StreamPart:
        """Every world-th sample of a stream that all have; of its own stream, a rank takes all."""
        if self.is_own:
            last = self.first + self.record.n_samples
            rows = rows[(rows >= self.first) & (rows < last)]
        else:
            rows = rows[ranks.positions(len(rows), start)]
        return StreamPart(self, self.draws.take(rows, start), rows)

    def walk(self) -> Iterator[Batch]:
        """Walk the loader; where it is split into folds its order must be as recorded.

        Raises:
            RuntimeError: Other samples than when the plan was made, or in another order.
        """
        # One fold is a set: it may come in any order. Several are told apart by position.
        ordered = bool((self.draws.folds != self.draws.folds[0]).any())
        start, length = 0, self.record.n_samples
        for number, item in enumerate(_stream(self.loader, self.seed)):
            inputs, targets = split_batch(item, self.dict_key_y)
            seen = (len(targets), content_checksum(targets)) if ordered else None
            if start + len(targets) > length or (ordered and seen != self._at(number)):
                raise self._changed(number)
            yield _batch(inputs, targets, self.draws, self.first + start)
            start += len(targets)
        if start != length:
            raise self._changed(len(self.record.sizes))

    def _at(self, number: int) -> tuple[int, int] | None:
        if number >= len(self.record.sizes):
            return None
        return self.record.sizes[number], self.record.checksums[number]

    def _changed(self, number: int) -> RuntimeError:
        return RuntimeError(
            f"The loader changed between two walks (batch {number}), so its folds cannot be told "
            "apart: pass an unshuffled loader, or a DataLoader over a map-style dataset (its order "
            "is kept, shuffled or not), or an explicit magnitude_loader."
        )


@dataclass(frozen=True, eq=False)
class StreamPart:
    """Some samples of a stream, which is walked whole.

    Attributes:
        whole: The stream.
        draws: The samples. [k]
        rows: Which of the stream's draws they are, ascending. [k] int64
    """

    whole: StreamSource
    draws: Draws
    rows: Tensor

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples in each batch that has any."""
        ends = torch.tensor(self.whole.record.sizes, dtype=torch.int64).cumsum(0) + self.whole.first
        counts = torch.bincount(torch.searchsorted(ends, self.rows, right=True))
        return tuple(count for count in counts.tolist() if count)

    def walk(self) -> Iterator[Batch]:
        """The samples, in the order in which they come."""
        taken = torch.zeros(len(self.whole.draws), dtype=torch.bool)
        taken[self.rows] = True
        start, done = self.whole.first, 0
        for batch in self.whole.walk() if len(self.rows) else ():
            rows = taken[start : start + len(batch)].nonzero().squeeze(-1)
            start += len(batch)
            if len(rows):
                part = batch if len(rows) == len(batch) else batch.select(rows)
                positions = self.draws.positions
                assert positions is not None
                yield replace(part, positions=positions[done : done + len(rows)])
                done += len(rows)
