"""Independent jobs, shared out by what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor

from laplace_debiased.parallel.ranks import Ranks

Result = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Job:
    """Something to compute.

    Attributes:
        name: of what.
        cost: what it takes, in any unit.
        run: computes it; the same on every rank up to rounding.
    """

    name: str
    cost: float
    run: Callable[[], Result]


class Runner(Protocol):
    """Runs jobs; every result on every rank."""

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """Results in the order of the jobs."""


Watched = Callable[[Iterable[Job]], Iterable[Job]]
"""Hands jobs on, one after the other, to take their times."""


def in_turn(jobs: Sequence[Job], watched: Watched = iter) -> list[Result]:
    """One after the other."""
    return [job.run() for job in watched(jobs)]


def shared_out(ranks: Ranks, what: str, watched: Watched = iter) -> Runner:
    """Each job on one rank, the costliest first, always to the rank with the least to do.

    Results are broadcast: what is unique up to rounding only (signs of eigenvectors, bases of
    degenerate subspaces) differs between machines, and all ranks must go on with the same.

    Args:
        ranks: all ranks.
        what: name of the jobs.
        watched: sees this rank's jobs.
    """
    if ranks.world == 1:
        return partial(in_turn, watched=watched)
    return partial(_share, ranks, what, watched)


def owners(costs: Sequence[float], world: int) -> list[int]:
    """Which rank takes which job."""
    loads, chosen = [0.0] * world, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[index] = min(range(world), key=loads.__getitem__)
        loads[chosen[index]] += costs[index]
    return chosen


def _share(ranks: Ranks, what: str, watched: Watched, jobs: Sequence[Job]) -> list[Result]:
    owner = owners([job.cost for job in jobs], ranks.world)
    mine = [index for index in range(len(jobs)) if owner[index] == ranks.rank]
    own = dict(zip(mine, in_turn([jobs[index] for index in mine], watched), strict=True))
    ranks.meet(what)
    results: list[Result] = [()] * len(jobs)
    for source in sorted(set(owner)):
        theirs = [index for index in range(len(jobs)) if owner[index] == source]
        values = [value for index in theirs for value in own.get(index, ())]
        [lengths] = ranks.broadcast([[len(own.get(index, ())) for index in theirs]], source)
        received = iter(ranks.broadcast(values, source))
        for index, length in zip(theirs, lengths, strict=True):
            results[index] = tuple(next(received) for _ in range(length))
    return results
