"""Where a long fit is: the sums so far and the batches behind them, in a file that is always whole.

A walk over a plan gives the same batches in the same order each time. So a fit that was killed
goes on from its last checkpoint: it loads the batches that are behind it without a pass over them,
checks that they are the same, and adds the rest to the sums. The result is the same to the bit.
"""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_debiased.data import Batch, CurvaturePlan, Score
from laplace_debiased.files import PathLike, read_record, remove_file, resolved_path, write_record
from laplace_debiased.network.identity import tensor_bytes

KIND = "laplace_debiased fit checkpoint"
FORMAT_VERSION = 1
DEFAULT_INTERVAL = 60.0
"""Seconds between two checkpoints."""


class Resumable(Protocol):
    """Sums that a walk adds to."""

    def state(self) -> dict[str, Any]:
        """The sums so far: tensors, plain values, and containers of such."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""


class FitCheckpoint:
    """The checkpoint of one fit.

    Args:
        path: the file; written while the fit runs, removed when it has succeeded.
        task: what identifies the fit, plain values: a file of another fit is refused.
        interval: seconds between two writes; 0 writes after every batch.
        device: device of the sums.

    Raises:
        TypeError: if ``path`` is no path or ``interval`` no number.
        ValueError: if the file belongs to another fit, or ``interval`` is negative.
        StoredFileError: if the file is damaged or something else.
        FileNotFoundError: if the folder does not exist.
    """

    def __init__(
        self,
        path: PathLike,
        task: Mapping[str, Any],
        interval: float = DEFAULT_INTERVAL,
        device: torch.device | str = "cpu",
    ) -> None:
        self._path = resolved_path(path)
        self._interval, self._device = _checked_interval(interval), torch.device(device)
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"checkpoint: the folder {self._path.parent} does not exist.")
        self._record: dict[str, Any] = {"task": dict(task), "plan": {}, "scores": [], "walks": {}}
        if self._path.exists():
            found = read_record(self._path, KIND, FORMAT_VERSION)
            self._check_same(found["task"], self._record["task"])
            self._record = {key: found[key] for key in self._record}
        self._written = time.monotonic()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def scored(self, score: Score) -> Score:
        """``score``, with the answers of the interrupted fit: the same pool, the same draws.

        A score that differs in its last digit would change which samples are drawn.
        """
        answers = iter(list(self._record["scores"]))

        def replayed(inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
            known = next(answers, None)
            if known is not None and len(known[0]) == len(targets):
                return known[0], known[1]
            given = score(inputs, targets)
            self._record["scores"].append([value.detach().cpu() for value in given])
            return given

        return replayed

    def bind(self, plan: CurvaturePlan, **details: Any) -> None:
        """Check that the plan is that of the interrupted fit, or remember it.

        Args:
            plan: the plan of this fit.
            details: further plain values that must agree.

        Raises:
            ValueError: if the data or draws are others.
        """
        present = {"data and draws": plan_digest(plan), **details}
        if self._record["plan"]:
            self._check_same(self._record["plan"], present)
        self._record["plan"] = present

    def walk(self, name: str, sums: Sequence[Resumable], key: str = "") -> WalkProgress:
        """One walk over the plan.

        Args:
            name: which walk of the fit.
            sums: what adds up what the walk gives; restored here if there is a stored state.
            key: what the sums were made along; a walk along something else starts anew.
        """
        stored = self._record["walks"].get(name)
        if stored is not None and stored["key"] != key:
            stored = None
        if stored is not None:
            for one, state in zip(sums, stored["sums"], strict=True):
                one.restore(_moved(state, self._device))
        return WalkProgress(self, name, key, tuple(sums), stored)

    def write(self, name: str, walk: Mapping[str, Any], *, now: bool = False) -> None:
        """Write a walk's state if the last write is long enough ago, or ``now``."""
        if not now and time.monotonic() - self._written < self._interval:
            return
        self._record["walks"][name] = dict(walk)
        write_record(self._path, KIND, FORMAT_VERSION, self._record)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove the file: the fit is done."""
        remove_file(self._path)

    def _check_same(self, stored: Mapping[str, Any], present: Mapping[str, Any]) -> None:
        for name in {**stored, **present}:
            was, now = stored.get(name), present.get(name)
            if was != now:
                raise ValueError(
                    f"the checkpoint {self._path} belongs to another fit: {name} was {was!r}, now "
                    f"it is {now!r}. Call fit as before to go on, pass another checkpoint path, or "
                    "remove the file to start anew."
                )


class WalkProgress:
    """How far one walk over a plan is. Made by :meth:`FitCheckpoint.walk`."""

    def __init__(
        self,
        checkpoint: FitCheckpoint,
        name: str,
        key: str,
        sums: tuple[Resumable, ...],
        stored: Mapping[str, Any] | None,
    ) -> None:
        self._checkpoint, self._name, self._key, self._sums = checkpoint, name, key, sums
        self._stored = stored
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
                    f"{self._checkpoint.path} cannot be continued: it shuffles or changes its "
                    "samples by itself. Pass an unshuffled loader or a DataLoader over a map-style "
                    "dataset, and remove the file to start anew."
                )
            generator.set_state(self._stored["generator"])
            self._stored = None
        return True

    def add(self, batch: Batch, generator: torch.Generator) -> None:
        """Tell that a batch is in the sums."""
        self._count(batch)
        self._checkpoint.write(self._name, self._state(generator))

    def finish(self, generator: torch.Generator) -> None:
        """Tell that all batches are in the sums.

        Raises:
            RuntimeError: if the walk ended before it came to where it had been.
        """
        if self._stored is not None and not self.complete:
            raise RuntimeError(
                f"the loader gave {self._position} batches, but {self._stored['position']} had "
                f"been seen when the fit was interrupted; {self._checkpoint.path} cannot be "
                "continued. Remove the file to start anew."
            )
        self._checkpoint.write(self._name, self._state(generator, complete=True), now=True)

    def _count(self, batch: Batch) -> None:
        self._position += 1
        self._checksum = _checksum(batch.targets, _checksum(batch.inputs, self._checksum))

    def _state(self, generator: torch.Generator, *, complete: bool = False) -> dict[str, Any]:
        return {
            "key": self._key,
            "position": self._position,
            "checksum": self._checksum,
            "complete": complete,
            "generator": generator.get_state(),
            "sums": [one.state() for one in self._sums],
        }


def plan_digest(plan: CurvaturePlan) -> str:
    """SHA-256 of which samples a plan takes, in which folds, with which weights."""
    digest = hashlib.sha256(repr((plan.n_data, plan.fold_sizes, plan.population)).encode())
    for source in plan.sources:
        draws = source.draws
        sizes = getattr(source, "batch_sizes", None)
        digest.update(repr((len(draws), source.n_batches, sizes)).encode())
        for values in (draws.folds, draws.counts, draws.weights, draws.indices):
            if values is not None:
                digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checksum(value: Any, start: int) -> int:
    if isinstance(value, Tensor):
        return zlib.crc32(tensor_bytes(value), start)
    if hasattr(value, "items"):
        for key, entry in value.items():
            start = _checksum(entry, zlib.crc32(str(key).encode(), start))
    elif isinstance(value, tuple | list):
        for entry in value:
            start = _checksum(entry, start)
    return start


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, device) for entry in value)
    return value


def _checked_interval(interval: object) -> float:
    if isinstance(interval, bool) or not isinstance(interval, int | float):
        raise TypeError(
            f"checkpoint_interval must be a number of seconds; got {type(interval).__name__}."
        )
    if not math.isfinite(interval) or interval < 0:
        raise ValueError(f"checkpoint_interval must be 0 or more seconds; got {interval}.")
    return float(interval)
