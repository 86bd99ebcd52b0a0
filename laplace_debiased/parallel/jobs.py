"""Independent jobs, shared out by what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from laplace_debiased.parallel.ranks import Ranks

Result = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Job:
    """Something to compute for ``name``, at a ``cost`` in any unit; the same on every rank."""

    name: str
    cost: float
    run: Callable[[], Result]


Runner = Callable[[Sequence[Job]], list[Result]]
"""Runs jobs: results in their order, every one on every rank."""

Watched = Callable[[Iterable[Job]], Iterable[Job]]
"""Hands jobs on, one after the other, to take their times."""


def in_turn(jobs: Sequence[Job], watched: Watched = iter) -> list[Result]:
    """One after the other."""
    return [job.run() for job in watched(jobs)]


def shared_out(
    jobs: Sequence[Job], ranks: Ranks, what: str, watched: Watched = iter
) -> list[Result]:
    """Each job on one rank, the costliest first, always to the rank with the least to do.

    Results are broadcast: what is unique up to rounding only (signs of eigenvectors, bases of
    degenerate subspaces) differs between machines, and all ranks must go on with the same.
    """
    if ranks.world == 1:
        return in_turn(jobs, watched)
    owner = owners([job.cost for job in jobs], ranks.world)
    mine = [index for index in range(len(jobs)) if owner[index] == ranks.rank]
    own = dict(zip(mine, in_turn([jobs[index] for index in mine], watched), strict=True))
    ranks.meet(what)
    for source in sorted(set(owner)):
        theirs = [index for index in range(len(jobs)) if owner[index] == source]
        values = [value for index in theirs for value in own.get(index, ())]
        received = iter(ranks.broadcast(values, source))
        own |= {index: (next(received), next(received)) for index in theirs}
    return [own[index] for index in range(len(jobs))]


def owners(costs: Sequence[float], world: int) -> list[int]:
    """Which rank takes which job."""
    loads, chosen = [0.0] * world, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[index] = min(range(world), key=loads.__getitem__)
        loads[chosen[index]] += costs[index]
    return chosen
