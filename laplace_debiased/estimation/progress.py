"""How far a walk over a plan is: what its sums stand for, and what is left to be walked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.sources import Batch, content_checksum

State = Callable[[], Mapping[str, Any]]

Write = Callable[[State, bool], None]
"""Writes a walk's state to its file, if it is time or told to do it now."""


class Resumable(Protocol):
    """Sums that a walk adds to."""

    def state(self) -> dict[str, Any]:
        """The sums so far: tensors, plain values, and containers of such."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what a :meth:`state` holds."""


@dataclass(eq=False)
class Progress:
    """How far one walk over a plan is on this rank; here of a walk that keeps nothing.

    Attributes:
        share: what is to be walked.
        complete: whether the sums are those of the whole walk over all ranks.
    """

    share: CurvaturePlan
    complete: bool

    def is_behind(self, batch: Batch) -> bool:
        """Whether a batch is in the sums already; call once per batch, in the order of the walk."""
        return False

    def add(self, batch: Batch) -> None:
        """Tell that a batch is in the sums."""

    def finish(self) -> None:
        """Tell that all batches are in this rank's sums."""

    def close(self, sums: Sequence[Resumable]) -> None:
        """Tell that the walk is done, with the sums of all ranks."""


@dataclass(eq=False)
class _Kept(Progress):
    """Of a walk whose sums are kept in a file.

    Attributes:
        write: writes the state.
        key: what the sums are made along.
        sums: what adds up what the walk gives.
    """

    write: Write
    key: str
    sums: Sequence[Resumable]

    def finish(self) -> None:
        """Tell that all batches are in this rank's sums."""
        self.write(self._state, True)

    def _state(self) -> dict[str, Any]:
        sums = [one.state() for one in self.sums]
        return {"key": self.key, "complete": self.complete, "sums": sums}


@dataclass(eq=False)
class WalkProgress(_Kept):
    """One process: the batches behind it are the first of the walk, as ``stored`` says."""

    path: Path
    stored: Mapping[str, Any] | None
    position: int = 0
    checksum: int = 0

    def is_behind(self, batch: Batch) -> bool:
        """Whether a batch is in the sums already.

        Raises:
            RuntimeError: if the batches are not the ones that were summed up.
        """
        if self.stored is None:
            return False
        self._count(batch)
        if self.position == self.stored["position"]:
            if self.checksum != self.stored["checksum"]:
                raise RuntimeError(
                    f"the loader gave other batches than before the fit was interrupted, so "
                    f"{self.path} cannot be continued: it shuffles or changes its "
                    "samples by itself. Pass an unshuffled loader or a DataLoader over a map-style "
                    "dataset, and remove the file to start anew."
                )
            self.stored = None
        return True

    def add(self, batch: Batch) -> None:
        """Tell that a batch is in the sums."""
        self._count(batch)
        self.write(self._state, False)

    def finish(self) -> None:
        """Tell that all batches are in the sums.

        Raises:
            RuntimeError: if the walk ended before it came to where it had been.
        """
        if self.stored is not None:
            raise RuntimeError(
                f"the loader gave {self.position} batches, but {self.stored['position']} had "
                f"been seen when the fit was interrupted; {self.path} cannot be "
                "continued. Remove the file to start anew."
            )
        self.complete = True
        super().finish()

    def _count(self, batch: Batch) -> None:
        self.position += 1
        self.checksum = content_checksum((batch.inputs, batch.targets), self.checksum)

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"position": self.position, "checksum": self.checksum}


@dataclass(eq=False)
class SharedProgress(_Kept):
    """Several processes, or what they left: sums, and the places in the plan behind them."""

    places: list[Tensor]
    keep: Callable[[State], None]

    def add(self, batch: Batch) -> None:
        """Tell that a batch is in the sums."""
        assert batch.positions is not None
        self.places.append(batch.positions)
        self.write(self._state, False)

    def close(self, sums: Sequence[Resumable]) -> None:
        """Tell that the walk is done: rank 0 keeps the sums of all ranks, the others nothing."""
        self.sums, self.complete = tuple(sums), True
        self.keep(self._state)

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"places": torch.cat(self.places)}


def chosen_sums(
    everyones: Sequence[Sequence[tuple[bool, Tensor]]], n_samples: int
) -> tuple[list[tuple[int, int]], bool]:
    """Which stored sums to take over, by rank and number, so that no place counts twice.

    The largest first; what overlaps with them is left out, and its other places computed again: a
    file that others have taken over may have outlived them. Of each stored sum of each rank it is
    known whether it is complete, and its places among ``n_samples``. Also returned is whether the
    choice is complete.
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
