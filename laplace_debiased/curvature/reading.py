"""From recorded calls to the rows of the parameters that they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from laplace_debiased.curvature.operations.call import OperationCall
from laplace_debiased.curvature.rows import BlockRows, joined_rows
from laplace_debiased.curvature.tape import Cotangents

Uses = dict[str, list[tuple[int, str]]]
"""By parameter name, which calls read it, and in which slot."""


def uses_of(calls: Sequence[OperationCall]) -> Uses:
    """Which calls read which parameter, in the order of the calls."""
    found: Uses = {}
    for index, call in enumerate(calls):
        for slot, use in call.uses.items():
            found.setdefault(use.name, []).append((index, slot))
    return found


def parameter_rows(
    calls: Sequence[OperationCall],
    places: Sequence[tuple[int, str]],
    columns: Sequence[Cotangents],
    *,
    columns_only: bool = False,
) -> BlockRows | None:
    """Rows of one parameter from all calls that read it; None if none affects the outputs.

    Args:
        calls: what was recorded.
        places: which of them read the parameter, and in which slot.
        columns: by call, R columns [m, R, ...] at what it wrote.
        columns_only: leave out the inputs, for the factor of the columns.
    """
    # What is a matrix here and a vector there is written out, which takes the inputs.
    alike = len({calls[index].uses[slot].place.shape for index, slot in places}) == 1
    found = []
    for index, slot in places:
        pulled = columns[index]
        if pulled is not None:
            rows = calls[index].rows(slot, pulled, columns_only=columns_only and alike)
            found.append(rows)
    return joined_rows(found) if found else None


def blocks_of(
    calls: Sequence[OperationCall], stacks: list[Cotangents]
) -> Iterator[tuple[str, BlockRows]]:
    """Rows of every parameter; columns are let go when their last reader has had them."""
    uses = uses_of(calls)
    waiting = [len(call.uses) for call in calls]
    for name, places in uses.items():
        rows = parameter_rows(calls, places, stacks)
        for index, _ in places:
            waiting[index] -= 1
            if waiting[index] == 0:
                stacks[index] = None
        if rows is not None:
            yield name, rows
