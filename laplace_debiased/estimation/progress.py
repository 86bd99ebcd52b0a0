"""How far a walk over a plan is: what its sums stand for, and what is left to be walked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_debiased.data import Batch, Share
from laplace_debiased.data.sources import content_checksum

State = Callable[[], Mapping[str, Any]]


class Write(Protocol):
    """Writes a walk's state to its file."""

    def __call__(self, state: State, *, now: bool = False) -> None:
        """If it is time, or ``now``."""


class Resumable(Protocol):
    """Sums that a walk adds to."""

    def state(self) -> dict[str, Any]:
        """The sums so far: tensors, plain values, and containers of such."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what a :meth:`state` holds."""


class Progress(Protocol):
    """How far one walk over a plan is on this rank.

    Attributes:
        share: what is to be walked.
        complete: whether the sums are those of the whole walk over all ranks.
    """

    share: Share
    complete: bool

    def is_behind(self, batch: Batch, generator: torch.Generator) -> bool:
        """Whether a batch is in the sums already; call once per batch, in the order of the walk."""

    def add(self, batch: Batch, generator: torch.Generator) -> None:
        """Tell that a batch is in the sums."""

    def finish(self, generator: torch.Generator) -> None:
        """Tell that all batches are in this rank's sums."""

    def close(self, sums: Sequence[Resumable]) -> None:
        """Tell that the walk is done.

        Args:
            sums: those of all ranks.
        """


class WalkProgress:
    """One process: the batches behind it are the first of the walk."""

    def __init__(
        self,
        write: Write,
        path: Path,
        key: str,
        sums: Sequence[Resumable],
        share: Share,
        stored: Mapping[str, Any] | None,
    ) -> None:
        self._write, self._path, self._key, self._sums = write, path, key, tuple(sums)
        self.share, self._stored = share, stored
        self.complete = stored is not None and bool(stored["complete"])
        self._position, self._checksum = 0, 0

    def is_behind(self, batch: Batch, generator: torch.Generator) -> bool:
        """Whether a batch is in the sums already; call once per batch, in the order of the walk.

        Args:
            batch: the next batch.
            generator: what the walk draws from; set to where it was when the last of them is met.

        Raises:
            RuntimeError: if the batches are not the ones that were summed up.
        """
        if self._stored is None:
            return False
        self._count(batch)
        if self._position == self._stored["position"]:
            if self._checksum != self._stored["checksum"]:
                raise RuntimeError(
                    f"the loader gave other batches than before the fit was interrupted, so "
                    f"{self._path} cannot be continued: it shuffles or changes its "
                    "samples by itself. Pass an unshuffled loader or a DataLoader over a map-style "
                    "dataset, and remove the file to start anew."
                )
            generator.set_state(self._stored["generator"])
            self._stored = None
        return True

    def add(self, batch: Batch, generator: torch.Generator) -> None:
        """Tell that a batch is in the sums."""
        self._count(batch)
        self._write(lambda: self._state(generator))

    def finish(self, generator: torch.Generator) -> None:
        """Tell that all batches are in the sums.

        Raises:
            RuntimeError: if the walk ended before it came to where it had been.
        """
        if self._stored is not None and not self.complete:
            raise RuntimeError(
                f"the loader gave {self._position} batches, but {self._stored['position']} had "
                f"been seen when the fit was interrupted; {self._path} cannot be "
                "continued. Remove the file to start anew."
            )
        self._write(lambda: self._state(generator, complete=True), now=True)

    def close(self, sums: Sequence[Resumable]) -> None:
        """One process has all there is."""

    def _count(self, batch: Batch) -> None:
        self._position += 1
        self._checksum = content_checksum((batch.inputs, batch.targets), self._checksum)

    def _state(self, generator: torch.Generator, *, complete: bool = False) -> dict[str, Any]:
        return {
            "key": self._key,
            "position": self._position,
            "checksum": self._checksum,
            "complete": complete,
            "generator": generator.get_state(),
            "sums": [one.state() for one in self._sums],
        }


class SharedProgress:
    """Several processes, or what they left: sums, and the places in the plan behind them."""

    def __init__(
        self,
        write: Write,
        close: Callable[[State], None],
        key: str,
        sums: Sequence[Resumable],
        share: Share,
        places: Tensor,
        complete: bool,
    ) -> None:
        self._write, self._close, self._key, self._sums = write, close, key, tuple(sums)
        self.share, self._places, self.complete = share, [places], complete

    def is_behind(self, batch: Batch, generator: torch.Generator) -> bool:
        """No batch is: the share leaves them out."""
        return False

    def add(self, batch: Batch, generator: torch.Generator) -> None:
        """Tell that a batch is in the sums."""
        assert batch.positions is not None
        self._places.append(batch.positions)
        self._write(self._state)

    def finish(self, generator: torch.Generator) -> None:
        """Tell that all batches are in this rank's sums."""
        self._write(self._state, now=True)

    def close(self, sums: Sequence[Resumable]) -> None:
        """Tell that the walk is done: rank 0 keeps the sums of all ranks, the others nothing."""
        self._sums = tuple(sums)
        self._close(lambda: self._state(complete=True))

    def _state(self, *, complete: bool = False) -> dict[str, Any]:
        return {
            "key": self._key,
            "places": torch.cat(self._places),
            "complete": complete,
            "sums": [one.state() for one in self._sums],
        }


def chosen_sums(
    everyones: Sequence[Sequence[tuple[bool, Tensor]]], n_samples: int
) -> tuple[list[tuple[int, int]], bool]:
    """Which stored sums to take over, by rank and number, so that no place counts twice.

    The largest first; what overlaps with them is left out, and its other places computed again: a
    file that others have taken over may have outlived them.

    Args:
        everyones: per rank, of each of its stored sums: whether it is complete, and its places.
        n_samples: places in the plan.

    Returns:
        The choice, and whether it is complete.
    """
    candidates = [(r, i) for r, stored in enumerate(everyones) for i in range(len(stored))]
    for rank, index in candidates:
        if everyones[rank][index][0]:
            return [(rank, index)], True
    taken, covered = [], torch.zeros(n_samples, dtype=torch.bool)
    for rank, index in sorted(candidates, key=lambda at: -len(everyones[at[0]][at[1]][1])):
        places = everyones[rank][index][1]
        if not bool(covered[places].any()):
            covered[places] = True
            taken.append((rank, index))
    return taken, False
