"""Where a plan's samples come from: a dataset with indices, or a stream of batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
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
from laplace_debiased.network.rng import guarded_iter

__all__ = ["IndexedSource", "StreamRecord", "StreamSource", "record_stream"]


def _batch(inputs: Any, targets: Tensor, draws: Draws, start: int) -> Batch:
    rows = slice(start, start + len(targets))
    return Batch(inputs, targets, draws.folds[rows], draws.counts[rows], draws.weights[rows])


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
    def n_batches(self) -> int:
        """Batches in one walk."""
        return len(self.batch_sizes)

    def walk(self) -> Iterator[Batch]:
        """Load the draws, in their order."""
        if self.draws.indices is None:
            raise ValueError("IndexedSource needs draws with indices, got draws without.")
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
    """

    sizes: tuple[int, ...]
    checksums: tuple[int, ...]

    @property
    def n_samples(self) -> int:
        """Samples in the walk."""
        return sum(self.sizes)


def _checksum(targets: Tensor) -> int:
    flat = targets.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().tobytes())


def _stream(loader: Any, seed: int) -> Iterator[Any]:
    return guarded_iter(lambda: restartable(loader), seed, generators=loader_generators(loader))


def record_stream(loader: Any, seed: int, dict_key_y: str, name: str = "loader") -> StreamRecord:
    """Walk a loader without indices once, for its batch sizes and checksums; loads all its data.

    Raises:
        ValueError: The loader yields nothing, or a batch lacks its targets.
        TypeError: A batch is neither a pair nor a mapping.
    """
    sizes, checksums = [], []
    for item in _stream(loader, seed):
        targets = split_batch(item, dict_key_y)[1]
        sizes.append(len(targets))
        checksums.append(_checksum(targets))
    if not sum(sizes):
        raise ValueError(f"{name} is empty: it yields no samples.")
    return StreamRecord(tuple(sizes), tuple(checksums))


@dataclass(frozen=True, eq=False)
class StreamSource:
    """Samples of a loader without indices, in the order in which they come.

    Attributes:
        loader: The user's loader or iterable of batches.
        draws: The samples. [n]
        record: The walk that the folds were assigned on.
        seed: Seed of a shuffle and of augmentations in the loader.
        dict_key_y: Key of the targets in mapping batches.
    """

    loader: Any
    draws: Draws
    record: StreamRecord
    seed: int
    dict_key_y: str

    @property
    def n_batches(self) -> int:
        """Batches in one walk."""
        return len(self.record.sizes)

    def walk(self) -> Iterator[Batch]:
        """Walk the loader; where it is split into folds its order must be as recorded.

        Raises:
            RuntimeError: Other samples than when the plan was made, or in another order.
        """
        # One fold is a set: it may come in any order. Several are told apart by position.
        ordered = bool((self.draws.folds != self.draws.folds[0]).any())
        start = 0
        for number, item in enumerate(_stream(self.loader, self.seed)):
            inputs, targets = split_batch(item, self.dict_key_y)
            seen = (len(targets), _checksum(targets)) if ordered else None
            if start + len(targets) > len(self.draws) or (ordered and seen != self._at(number)):
                raise self._changed(number)
            yield _batch(inputs, targets, self.draws, start)
            start += len(targets)
        if start != len(self.draws):
            raise self._changed(self.n_batches)

    def _at(self, number: int) -> tuple[int, int] | None:
        if number >= self.n_batches:
            return None
        return self.record.sizes[number], self.record.checksums[number]

    def _changed(self, number: int) -> RuntimeError:
        return RuntimeError(
            f"The loader changed between two walks (batch {number}), so its folds cannot be told "
            "apart: pass an unshuffled loader, or a DataLoader over a map-style dataset (its order "
            "is kept, shuffled or not), or an explicit magnitude_loader."
        )
