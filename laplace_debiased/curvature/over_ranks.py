"""Sums of factors and of directional curvature over all ranks, in one reduction per walk.

A factor that no rank alone has enough rows for may have them together. It is a matrix exactly
where one process would have made one: where all rows together are as many as its side. Below that
the rows travel, each rank's to its own place among zeros, so that they need no message of another
kind; from there on matrices do, and what is sent no longer depends on the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.factors import FactorAccumulator, MagnitudeAccumulator
from laplace_debiased.curvature.rows.gram import (
    Factor,
    RowsFactor,
    dense,
    factor_from_state,
    factor_to_state,
)
from laplace_debiased.parallel import Ranks, summed

Key = tuple[int, str, str]
"""Which fold, which side of the parameter as a matrix ("rows" or "columns"), and its name."""


@dataclass(frozen=True)
class _Form:
    """What a rank has of a factor.

    Attributes:
        shape: of the factor as a matrix, or of a diagonal.
        dtype: of its entries.
        n_rows: number of rows that it is kept as; None for a matrix.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    n_rows: int | None

    @classmethod
    def of(cls, factor: Factor) -> _Form:
        n_rows = factor.rows.shape[-2] if isinstance(factor, RowsFactor) else None
        return cls(tuple(factor.shape), factor.dtype, n_rows)


def factors_over_ranks(ranks: Ranks, sums: Sequence[FactorAccumulator]) -> None:
    """Let every rank's accumulators, one per fold, hold the sums of all ranks."""
    if ranks.world == 1:
        return
    states = [one.state() for one in sums]
    own: dict[Key, Factor] = {
        (fold, side, name): factor_from_state(value)
        for fold, state in enumerate(states)
        for side in ("rows", "columns")
        for name, value in state[side].items()
    }
    found = summed_factors(ranks, own)
    for fold, one in enumerate(sums):
        total: dict[str, Any] = {"rows": {}, "columns": {}}
        for (of_fold, side, name), factor in found.items():
            if of_fold == fold:
                total[side][name] = factor_to_state(factor)
        one.clear()
        one.restore(total)


def magnitudes_over_ranks(ranks: Ranks, sums: Sequence[MagnitudeAccumulator]) -> None:
    """Let every rank's accumulators, one per eigenbasis, hold the sums of all ranks."""
    if ranks.world == 1:
        return
    tables = [one.full() for one in sums]
    names = [(index, name) for index, own in enumerate(tables) for name in own]
    found = summed(ranks, "directional curvature", [tables[i][name] for i, name in names])
    for index, one in enumerate(sums):
        parts = {n: table for (i, n), table in zip(names, found, strict=True) if i == index}
        one.clear()
        one.restore({"tables": parts})


def summed_factors(ranks: Ranks, own: Mapping[Key, Factor]) -> dict[Key, Factor]:
    """Σ over ranks of factors by key; a rank may have none of some."""
    forms = ranks.gathered("factors", {key: _Form.of(factor) for key, factor in own.items()})
    keys = sorted(set().union(*forms))
    counts = {key: _row_counts([form.get(key) for form in forms]) for key in keys}
    tensors, symmetric = [], set()
    for index, key in enumerate(keys):
        form = next(form[key] for form in forms if key in form)
        rows = counts[key]
        if rows is None:
            tensors.append(_matrix(own.get(key), form, ranks.home))
            if len(form.shape) > 1:
                symmetric.add(index)
        else:
            start = sum(rows[: ranks.rank])
            tensors.append(_among_zeros(own.get(key), form, sum(rows), start, ranks.home))
    found = summed(ranks, "sums of factors", tensors, symmetric)
    return {
        key: tensor if counts[key] is None else RowsFactor(tensor)
        for key, tensor in zip(keys, found, strict=True)
    }


def _row_counts(forms: Sequence[_Form | None]) -> list[int] | None:
    """How many rows every rank has; None where the sum is a matrix."""
    counts = []
    for form in forms:
        if form is not None and (form.n_rows is None):
            return None
        counts.append(0 if form is None or form.n_rows is None else form.n_rows)
    side = next(form.shape[-1] for form in forms if form is not None)
    return counts if sum(counts) < side else None


def _matrix(factor: Factor | None, form: _Form, device: torch.device) -> Tensor:
    if factor is None:
        return torch.zeros(form.shape, dtype=form.dtype, device=device)
    return dense(factor)


def _among_zeros(
    factor: Factor | None, form: _Form, n_rows: int, start: int, device: torch.device
) -> Tensor:
    shape = (*form.shape[:-2], n_rows, form.shape[-1])
    whole = torch.zeros(shape, dtype=form.dtype, device=device)
    if isinstance(factor, RowsFactor):
        whole[..., start : start + factor.rows.shape[-2], :] = factor.rows
    return whole
