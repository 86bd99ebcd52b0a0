"""Where a long fit is: the sums so far and the samples behind them, in files that are always whole.

A walk over a plan gives the same batches in the same order each time. So a fit that was killed
goes on from its last checkpoint: it loads the batches that are behind it without a pass over them,
checks that they are the same, and adds the rest to the sums. The result is the same to the bit.

Of several processes each keeps a file of its own, with the places in the plan that its sums stand
for. Sums add up, so any number of processes may go on from any set of such files: they take over
what these hold, each place once, and share out what is left of the plan.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_debiased.data.plan import CurvaturePlan, PoolScores
from laplace_debiased.data.sources import Batch, content_checksum
from laplace_debiased.errors import StoredFileError
from laplace_debiased.files import PathLike, read_record, remove_file, resolved_path, write_record
from laplace_debiased.network.inputs import to_device
from laplace_debiased.network.interrupts import uninterrupted
from laplace_debiased.parallel.ranks import Ranks

KIND = "laplace_debiased fit checkpoint"
FORMAT_VERSION = 3
DEFAULT_INTERVAL = 60.0
"""Seconds between two checkpoints."""


class Resumable(Protocol):
    """Sums that a walk adds to."""

    def state(self) -> dict[str, Any]:
        """The sums so far: tensors, plain values, and containers of such."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what a :meth:`state` holds."""


class FitCheckpoint:
    """The checkpoint of one fit.

    Args:
        path: the file; written while the fit runs, removed when it has succeeded. Ranks from 1 on
            write beside it, ``path.rank1`` and so on.
        task: what identifies the fit, plain values: a file of another fit is refused.
        interval: seconds between two writes; 0 writes after every batch.
        ranks: all ranks.

    Raises:
        TypeError: if ``path`` is no path.
        ValueError: if a file belongs to another fit.
        StoredFileError: if a file is damaged, something else, or of an earlier version.
        FileNotFoundError: if the folder does not exist.
    """

    def __init__(
        self,
        path: PathLike,
        task: Mapping[str, Any],
        interval: float,
        ranks: Ranks,
    ) -> None:
        self._base, self._ranks = resolved_path(path), ranks
        suffix = "" if ranks.is_first else f".rank{ranks.rank}"
        self.path = self._base.with_name(self._base.name + suffix)
        self._interval = interval
        if not self._base.parent.is_dir():
            raise FileNotFoundError(f"checkpoint: the folder {self._base.parent} does not exist.")
        self._task = dict(task)
        self._found = self._read()
        self._record: dict[str, Any] = {"task": self._task, "plan": {}, "scores": [], "walks": {}}
        self._written = time.monotonic()

    def scores(self, indices: Tensor, score: Callable[[], PoolScores]) -> PoolScores:
        """Scores of some samples, from the interrupted fit if it had them.

        A score that differs in its last digit would change which samples are drawn.
        """
        known = [
            given
            for record in self._found.values()
            for given in record["scores"]
            if torch.equal(given[0], indices)
        ]
        everyones = self._ranks.gathered("known scores", known[:1])
        given = next((scores[0] for scores in everyones if scores), None)
        found = score() if given is None else PoolScores(*given)
        self._record["scores"].append([found.indices, found.scores, found.losses])
        return found

    def bind(self, plan: CurvaturePlan, **details: Any) -> None:
        """Check that the plan, and further plain values, are those of the interrupted fit.

        Raises:
            ValueError: if the data or draws are others.
        """
        present = {"data and draws": plan_digest(plan), **details}
        for path, record in self._found.items():
            if record["plan"]:
                _check_same(path, record["plan"], present)
        self._record["plan"] = present

    def walk(
        self, name: str, sums: Sequence[Resumable], plan: CurvaturePlan, key: str = ""
    ) -> Progress:
        """One walk over the plan; what the files hold of it is added to the sums.

        Each stored sum is taken over by the rank that has read it, and the rest shared out. ``key``
        is what the sums are made along: a walk along something else starts anew.
        """
        stored = [
            walk
            for record in self._found.values()
            if (walk := record["walks"].get(name)) is not None and walk["key"] == key
        ]
        places, ranks = [_places(walk, plan) for walk in stored], self._ranks
        everyones = ranks.gathered(
            f"what is known of {name}",
            [(walk["complete"], at) for walk, at in zip(stored, places, strict=True)],
        )
        taken, complete = chosen_sums(everyones, plan.n_samples)
        mine = [index for rank, index in taken if rank == ranks.rank]
        for walk in (stored[index] for index in mine):
            for one, state in zip(sums, walk["sums"], strict=True):
                one.restore(to_device(state, ranks.home))
            self._record["walks"][name] = walk
        progress = Progress(plan, complete, self, name, key, sums)
        alone = ranks.world == 1 and set(self._found) <= {self.path}
        if alone and not any("places" in walk for walk in stored):
            return replace(progress, behind=None if complete or not stored else stored[0])
        nothing = torch.empty(0, dtype=torch.int64)
        done = torch.cat([nothing, *(everyones[rank][index][1] for rank, index in taken)])
        own = torch.cat([nothing, *(places[index] for index in mine)])
        return replace(progress, share=plan.share(ranks, done), places=[own])

    def write(self, name: str, state: Callable[[], Mapping[str, Any]], *, now: bool) -> None:
        """Write a walk's state if the last write is long enough ago, or ``now``."""
        if not now and time.monotonic() - self._written < self._interval:
            return
        self._record["walks"][name] = state()
        with uninterrupted():  # as where posteriors are saved
            write_record(self.path, KIND, FORMAT_VERSION, self._record)
        self._written = time.monotonic()

    def close(self, name: str, state: Callable[[], Mapping[str, Any]]) -> None:
        """Keep a walk's state, of all ranks, with rank 0 alone."""
        if self._ranks.is_first:
            self.write(name, state, now=True)
        self._ranks.meet(f"the file of {name}")
        if not self._ranks.is_first:
            self._record["walks"].pop(name, None)

    def remove(self) -> None:
        """Remove the files: the fit is done."""
        for path in (self._base, self.path, *self._files_of_ranks()):
            remove_file(path)

    # -- files -------------------------------------------------------------------------------

    def _files_of_ranks(self) -> list[Path]:
        prefix = f"{self._base.name}.rank"
        return sorted(
            path
            for path in self._base.parent.iterdir()
            if path.name.startswith(prefix) and path.name[len(prefix) :].isdigit()
        )

    def _read(self) -> dict[Path, dict[str, Any]]:
        """The records that this rank is to read: each file is read once, by a rank that sees it."""
        seen = [path for path in (self._base, *self._files_of_ranks()) if path.exists()]
        everyones = self._ranks.gathered("checkpoint files", [path.name for path in seen])
        readers = _readers(everyones, self._base.name)
        return {
            path: self._checked(path) for path in seen if readers[path.name] == self._ranks.rank
        }

    def _checked(self, path: Path) -> dict[str, Any]:
        found = read_record(path, KIND, FORMAT_VERSION)
        if found["format_version"] < FORMAT_VERSION:
            raise StoredFileError(
                f"{path} was written by an earlier version of laplace-debiased, which alone can "
                "continue it: remove the file to start anew."
            )
        _check_same(path, found["task"], self._task)
        return found


@dataclass(eq=False)
class Progress:
    """How far one walk over a plan is on this rank.

    Attributes:
        share: what is to be walked.
        complete: whether the sums are those of the whole walk over all ranks.
        checkpoint: where they are kept; None where they are not.
        name: what the walk is for.
        key: what the sums are made along.
        sums: what adds up what the walk gives.
        behind: one process: the state to which the first batches of the walk lead.
        places: several, or what they left: places in the plan of what the sums stand for.
    """

    share: CurvaturePlan
    complete: bool = False
    checkpoint: FitCheckpoint | None = None
    name: str = ""
    key: str = ""
    sums: Sequence[Resumable] = ()
    behind: Mapping[str, Any] | None = None
    places: list[Tensor] | None = None
    _position: int = 0
    _checksum: int = 0

    def is_behind(self, batch: Batch) -> bool:
        """Whether a batch is in the sums already; call once per batch, in the order of the walk.

        Raises:
            RuntimeError: if the batches are not the ones that were summed up.
        """
        if self.behind is None or self.checkpoint is None:
            return False
        self._count(batch)
        if self._position == self.behind["position"]:
            if self._checksum != self.behind["checksum"]:
                raise RuntimeError(
                    "the loader gave other batches than before the fit was interrupted, so "
                    f"{self.checkpoint.path} cannot be continued: it shuffles or changes its "
                    "samples by itself. Pass an unshuffled loader or a DataLoader over a map-style "
                    "dataset, and remove the file to start anew."
                )
            self.behind = None
        return True

    def add(self, batch: Batch) -> None:
        """Tell that a batch is in the sums."""
        if self.checkpoint is None:
            return
        if self.places is None:
            self._count(batch)
        else:
            assert batch.positions is not None
            self.places.append(batch.positions)
        self.checkpoint.write(self.name, self._state, now=False)

    def finish(self) -> None:
        """Tell that all batches are in this rank's sums.

        Raises:
            RuntimeError: if the walk ended before it came to where it had been.
        """
        if self.checkpoint is None:
            return
        if self.behind is not None:
            raise RuntimeError(
                f"the loader gave {self._position} batches, but {self.behind['position']} had "
                f"been seen when the fit was interrupted; {self.checkpoint.path} cannot be "
                "continued. Remove the file to start anew."
            )
        if self.places is not None:  # another rank may die before all are added up
            self.checkpoint.write(self.name, self._state, now=True)

    def close(self, sums: Sequence[Resumable]) -> None:
        """Tell that the walk is done, with the sums of all ranks: rank 0 keeps them."""
        if self.checkpoint is None or (self.complete and self.places is None):
            return
        self.sums, self.complete = tuple(sums), True
        self.checkpoint.close(self.name, self._state)

    def _count(self, batch: Batch) -> None:
        self._position += 1
        self._checksum = content_checksum((batch.inputs, batch.targets), self._checksum)

    def _state(self) -> dict[str, Any]:
        sums = [one.state() for one in self.sums]
        state = {"key": self.key, "complete": self.complete, "sums": sums}
        if self.places is None:
            return state | {"position": self._position, "checksum": self._checksum}
        return state | {"places": torch.cat(self.places)}


def _places(walk: Mapping[str, Any], plan: CurvaturePlan) -> Tensor:
    """Places in the plan that sums stand for; one process has stored the number of batches."""
    if "places" in walk:
        return walk["places"]
    return torch.arange(sum(plan.batch_sizes[: walk["position"]]))


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


def _readers(everyones: Sequence[Sequence[str]], base: str) -> dict[str, int]:
    """Who reads which file: the rank that it is named after if that sees it, else one that does."""
    loads, readers = [0] * len(everyones), {}
    for name in sorted({name for names in everyones for name in names}):
        number = 0 if name == base else int(name.rpartition(".rank")[2])
        seers = [rank for rank, names in enumerate(everyones) if name in names]
        readers[name] = number if number in seers else min(seers, key=loads.__getitem__)
        loads[readers[name]] += 1
    return readers


def _check_same(path: Path, stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    for name in {**stored, **present}:
        was, now = stored.get(name), present.get(name)
        if was != now:
            raise ValueError(
                f"the checkpoint {path} belongs to another fit: {name} was {was!r}, now "
                f"it is {now!r}. Call fit as before to go on, pass another checkpoint path, or "
                "remove the file to start anew."
            )


def plan_digest(plan: CurvaturePlan) -> str:
    """SHA-256 of which samples a plan takes, in which folds, with which weights."""
    digest = hashlib.sha256(repr((plan.n_data, plan.fold_sizes, plan.population)).encode())
    for source in plan.sources:
        draws = source.draws
        sizes = None if draws.indices is None else source.batch_sizes
        digest.update(repr((len(draws), len(source.batch_sizes), sizes)).encode())
        for values in (draws.folds, draws.counts, draws.weights, draws.indices):
            if values is not None:
                digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()
