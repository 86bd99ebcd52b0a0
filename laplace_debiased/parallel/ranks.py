"""The processes of one collective call, and how they stay together.

Before ranks exchange anything they meet: each tells whether it is well and where it is. A rank that
raised takes part in one more meeting instead of what the others are about to do, so that all leave
the call with an error, and are ready for the next one.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_debiased.errors import RankFailedError, RankLostError

T = TypeVar("T")

_CPU = torch.device("cpu")

_TOLD = "_laplace_debiased_told_ranks"
"""Mark of an exception that the other ranks know of, so that an outer call does not tell again."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a collective call. Of one process all operations are identities.

    Attributes:
        rank: this process, 0..world−1.
        world: how many there are.
        device: where tensors must be to be exchanged.
        home: where received tensors are wanted, the model's device.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = _CPU
    home: torch.device = _CPU

    @classmethod
    def present(cls, home: torch.device) -> Ranks:
        """All processes of the default group; this one alone where there is no group.

        ``home`` is the model's device. Groups that cannot send from there get copies.
        """
        distributed = sys.modules.get("torch.distributed")
        if distributed is None or not distributed.is_available():
            return cls(home=home)
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls(home=home)
        at = _exchange_device(str(distributed.get_backend_config()), home)
        return cls(distributed.get_rank(), distributed.get_world_size(), at, home)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which draws, shows progress and writes."""
        return self.rank == 0

    def positions(self, n: int) -> Tensor:
        """Which of n samples this rank takes: every world-th. int64."""
        return torch.arange(n)[self.rank :: self.world]

    # -- staying together ------------------------------------------------------------------

    @contextmanager
    def together(self, call: str) -> Iterator[None]:
        """A collective call: if one rank raises inside, all do.

        Raises:
            RankFailedError: on the ranks that did not raise themselves.
            RankLostError: if a rank does not answer.
        """
        if self.world == 1:
            yield
            return
        try:
            yield
            self.meet(f"the end of {call}")
        except (RankFailedError, RankLostError):
            raise
        except BaseException as error:
            if not hasattr(error, _TOLD):
                setattr(error, _TOLD, True)
                # Whoever is gone cannot be told; this rank's own error is what matters here.
                with suppress(RankFailedError, RankLostError):
                    self.meet(call, f"{type(error).__name__}: {error}")
            raise

    def meet(self, where: str, failure: str | None = None) -> None:
        """Wait for all ranks at the same place; ``failure`` is what this rank raised, if it did.

        Raises:
            RankFailedError: if a rank did, or ranks are at different places.
            RankLostError: if a rank does not answer.
        """
        if self.world == 1:
            return
        place = _mark(where)
        failed, highest, lowest = self._maxima(failure is not None, place, -place)
        if failed:
            failures = self._gather_objects(failure)
            first = next(rank for rank, text in enumerate(failures) if text is not None)
            raise RankFailedError(
                f"rank {first} of {self.world} raised {failures[first]} (see its own traceback); "
                "this call has ended on every rank and changed nothing."
            )
        if highest != -lowest:
            places = self._gather_objects(where)
            other = next(rank for rank, text in enumerate(places) if text != places[0])
            raise RankFailedError(
                f"ranks make different calls: rank 0 is at {places[0]!r}, rank {other} at "
                f"{places[other]!r}. Every rank must make the same calls with the same arguments."
            )

    def agree(self, call: str, values: Mapping[str, Any]) -> None:
        """Check that plain values are the same on every rank.

        Raises:
            ValueError: on every rank, naming what differs.
        """
        if self.world == 1:
            return
        mark = _mark(repr(sorted(values.items())))
        self.meet(f"the arguments of {call}")
        highest, lowest = self._maxima(mark, -mark)
        if highest == -lowest:
            return
        everyone = self._gather_objects(dict(values))
        for rank, theirs in enumerate(everyone):
            differing = [
                f"{name} ({theirs.get(name)!r}, not {everyone[0].get(name)!r})"
                for name in {**everyone[0], **theirs}
                if theirs.get(name) != everyone[0].get(name)
            ]
            if differing:
                raise ValueError(
                    f"{call} needs the same arguments on every rank, but rank {rank} differs from "
                    f"rank 0 in: {', '.join(differing)}."
                )

    # -- exchanging --------------------------------------------------------------------------

    def gathered(self, what: str, value: T) -> list[T]:
        """Every rank's value, small and of plain types or CPU tensors, in the order of ranks."""
        if self.world == 1:
            return [value]
        self.meet(what)
        return self._gather_objects(value)

    def from_first(self, what: str, make: Callable[[], Sequence[Any]]) -> list[Any]:
        """What rank 0 makes, on every rank: tensors and plain values."""
        if self.world == 1:
            return list(make())
        made = list(make()) if self.is_first else []
        self.meet(what)
        return self.broadcast(made, 0)

    def broadcast(self, values: Sequence[Any], source: int) -> list[Any]:
        """A rank's tensors (at home) and plain values on every rank; after a meeting."""
        box: list[Any] = [[_Form(v.shape, v.dtype) if isinstance(v, Tensor) else v for v in values]]
        received = []
        with self._exchange() as distributed:
            distributed.broadcast_object_list(box, source, device=self.device)
            for form, own in zip(box[0], values or [None] * len(box[0]), strict=True):
                if not isinstance(form, _Form):
                    received.append(form)
                elif self.rank == source:
                    distributed.broadcast(own.detach().to(self.device).contiguous(), source)
                    received.append(own)
                else:
                    tensor = torch.empty(form.shape, dtype=form.dtype, device=self.device)
                    distributed.broadcast(tensor, source)
                    received.append(tensor.to(self.home))
        return received

    def add_up(self, flat: Tensor) -> None:
        """Sum of every rank's vector, in place; it is on ``self.device``. After a meeting."""
        with self._exchange() as distributed:
            distributed.all_reduce(flat)

    def _maxima(self, *numbers: int) -> list[int]:
        """The largest of every rank's numbers."""
        largest = torch.tensor(numbers, device=self.device)
        with self._exchange() as distributed:
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return largest.tolist()

    def _gather_objects(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.world
        with self._exchange() as distributed:
            distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def _exchange(self) -> Iterator[Any]:
        """The functions of ``torch.distributed``; a rank that does not answer is named."""
        import torch.distributed

        try:
            yield torch.distributed
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            raise RankLostError(
                f"rank {self.rank} of {self.world} waits for another rank in vain: it died, or "
                "took longer than the time-out of the process group, see "
                f"init_process_group(timeout=...). Start all ranks again. torch says: {said}"
            ) from error


ALONE = Ranks()
"""One process."""


@dataclass(frozen=True)
class _Form:
    """A tensor that is yet to come."""

    shape: torch.Size
    dtype: torch.dtype


def _mark(text: str) -> int:
    """A number that tells texts apart."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _exchange_device(backends: str, home: torch.device) -> torch.device:
    """Where tensors are exchanged: on the model's device if NCCL is there, else on the CPU.

    ``backends`` is as torch says it, "cpu:gloo,cuda:nccl".
    """
    of = dict(pair.split(":", 1) for pair in backends.split(",") if ":" in pair)
    if home.type == "cuda" and of.get("cuda") == "nccl":
        return home
    if of.get("cpu") == "nccl" or "cpu" not in of:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
