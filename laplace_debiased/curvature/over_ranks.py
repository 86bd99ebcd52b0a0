"""Sums of factors and of directional curvature over all ranks, in one reduction per walk.

A factor that no rank alone has enough rows for may have them together. It is a matrix exactly
where one process would have made one: where all rows together are as many as its side. Below that
the rows travel, each rank's to its own place among zeros, so that they need no message of another
kind; from there on matrices do, and what is sent no longer depends on the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from laplace_debiased.curvature.factors import FactorAccumulator, MagnitudeAccumulator
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor, dense
from laplace_debiased.parallel.ranks import Ranks
from laplace_debiased.parallel.sums import summed

Key = tuple[int, str, str]
"""Which fold, which side of the parameter as a matrix ("rows" or "columns"), and its name."""


class _Form(NamedTuple):
    """What a rank has of a factor: its shape as a matrix, dtype, and as how many rows, or None."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    n_rows: int | None


def _form(factor: Factor) -> _Form:
    n_rows = factor.rows.shape[-2] if isinstance(factor, RowsFactor) else None
    return _Form(tuple(factor.shape), factor.dtype, n_rows)


def factors_over_ranks(ranks: Ranks, sums: Sequence[FactorAccumulator]) -> None:
    """Let every rank's accumulators, one per fold, hold the sums of all ranks."""
    if ranks.world == 1:
        return
    own = {(fold, *key): f for fold, one in enumerate(sums) for key, f in one.factors().items()}
    found = summed_factors(ranks, own)
    for fold, one in enumerate(sums):
        one.replace({key[1:]: factor for key, factor in found.items() if key[0] == fold})


def magnitudes_over_ranks(ranks: Ranks, sums: Sequence[MagnitudeAccumulator]) -> None:
    """Let every rank's accumulators, one per eigenbasis, hold the sums of all ranks."""
    if ranks.world == 1:
        return
    names = [(one, name) for one in sums for name in one.sums]
    found = summed(ranks, "directional curvature", [one.sums[name] for one, name in names])
    for (one, name), table in zip(names, found, strict=True):
        one.sums[name] = table


def summed_factors(ranks: Ranks, own: Mapping[Key, Factor]) -> dict[Key, Factor]:
    """Σ over ranks of factors by key; a rank may have none of some."""
    forms = ranks.gathered("factors", {key: _form(factor) for key, factor in own.items()})
    keys = sorted(set().union(*forms))
    counts = {key: _row_counts([form.get(key) for form in forms]) for key in keys}
    tensors, symmetric = [], set()
    for index, key in enumerate(keys):
        form, rows = next(form[key] for form in forms if key in form), counts[key]
        factor, shape = own.get(key), form.shape
        if rows is None and factor is not None:
            tensors.append(dense(factor))
        else:
            shape = shape if rows is None else (*shape[:-2], sum(rows), shape[-1])
            tensors.append(torch.zeros(shape, dtype=form.dtype, device=ranks.home))
        if rows is None and len(shape) > 1:
            symmetric.add(index)
        if rows is not None and isinstance(factor, RowsFactor):
            start = sum(rows[: ranks.rank])
            tensors[-1][..., start : start + rows[ranks.rank], :] = factor.rows
    found = summed(ranks, "sums of factors", tensors, symmetric)
    return {
        key: tensor if counts[key] is None else RowsFactor(tensor)
        for key, tensor in zip(keys, found, strict=True)
    }


def _row_counts(forms: Sequence[_Form | None]) -> list[int] | None:
    """How many rows every rank has; None where the sum is a matrix."""
    known = [form for form in forms if form is not None]
    counts = [0 if form is None or form.n_rows is None else form.n_rows for form in forms]
    if any(form.n_rows is None for form in known) or sum(counts) >= known[0].shape[-1]:
        return None
    return counts
