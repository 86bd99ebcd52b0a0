"""The bias that the folds of a fit reveal, without any further pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

N_PARTS = 10


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a bias report needs of one measured eigenbasis; all tensors float64, on the CPU.

    Attributes:
        own: sums of the own batch's magnitudes [10] over each tenth of the directions, from those
            of largest own magnitude to those of smallest.
        other: sums of the held-out magnitudes over the same directions [10].
    """

    own: Tensor
    other: Tensor

    def to_state(self) -> dict[str, Tensor]:
        """By name."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: Any, name: str) -> Comparison:
        """Of :meth:`to_state`, or of tables as files of versions 1 and 2 hold them.

        Raises:
            ValueError: naming the entry of ``name`` that is no vector of finite numbers [10].
        """
        if not isinstance(state, Mapping):
            own, other = ((s,) if isinstance(s, Tensor) else tuple(s) for s in state)
            return compared(own, other)
        for entry in ("own", "other"):  # earlier files have largest magnitudes beside them
            value = state.get(entry)
            if not isinstance(value, Tensor) or value.shape != (N_PARTS,) or value.is_complex():
                raise ValueError(f"'{name}/{entry}' must be a tensor of {N_PARTS} numbers.")
            if not bool(value.isfinite().all()):
                raise ValueError(f"'{name}/{entry}' holds NaN or infinity.")
        return cls(state["own"], state["other"])


def compared(
    own: Sequence[Tensor], other: Sequence[Tensor], counts: Sequence[Tensor] | None = None
) -> Comparison:
    """Summarise magnitude tables, one per block: of the own batch, and of held-out samples.

    ``counts``: how many directions every entry stands for; None for one.
    """
    of_own = _flat(own)
    order = of_own.argsort(descending=True)
    of_own, of_other = of_own[order], _flat(other)[order]
    n = torch.ones_like(of_own) if counts is None else _flat(counts)[order]
    parts = list(_tenths(n))
    return Comparison(
        torch.stack([of_own[at] @ shares for at, shares in parts]),
        torch.stack([of_other[at] @ shares for at, shares in parts]),
    )


def _flat(tables: Sequence[Tensor]) -> Tensor:
    return torch.cat([table.flatten() for table in tables]).cpu().double()


def _tenths(counts: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Entries of each tenth of the directions, with how many of each one's directions lie in it."""
    ends = counts.cumsum(0)
    starts = ends - counts
    least, more = divmod(int(ends[-1]), N_PARTS)
    low = 0
    for part in range(N_PARTS):
        high = low + least + (part < more)
        first = int(torch.searchsorted(ends, low, right=True))
        last = max(first, int(torch.searchsorted(starts, high)))
        at = slice(first, last)
        yield at, (ends[at].clamp_max(high) - starts[at].clamp_min(low)).clamp_min(0.0)
        low = high


@dataclass(frozen=True)
class BiasReport:
    """Own-batch over other-batch curvature along the directions of a fit.

    Both are K-FAC magnitudes (per-sample means) in the same eigenbases: as the batch that gave the
    directions reports them, and as held-out samples measure them. Without bias every ratio is 1.

    Attributes:
        decile_ratios: Σ own / Σ other over each tenth of the directions, from the directions of
            largest own curvature to those of smallest. NaN where neither batch has any, infinite
            where only the own batch does.
        decile_errors: standard error of each, over the folds (NaN with a single measurement).
        scale_ratio: Σ own / Σ other over all directions: whether the scale agrees.
        scale_error: its standard error over the folds (NaN with a single measurement).
    """

    decile_ratios: tuple[float, ...]
    decile_errors: tuple[float, ...]
    scale_ratio: float
    scale_error: float

    def __str__(self) -> str:
        lines = ["Curvature on the directions' own batch over curvature on other data:"]
        for index, (ratio, error) in enumerate(
            zip(self.decile_ratios, self.decile_errors, strict=True)
        ):
            lines.append(f"  {10 * index:>3}–{10 * index + 10:<3} % {_stated(ratio, error)}")
        lines.append(f"  all       {_stated(self.scale_ratio, self.scale_error)}")
        return "\n".join(lines)


def bias_report(comparisons: Sequence[Comparison]) -> BiasReport:
    """Put comparisons together, one per measured eigenbasis.

    Raises:
        ValueError: if there is nothing to compare.
    """
    if not comparisons:
        raise ValueError(
            "bias_report compares a batch with others, but scheme='single' has one batch only. "
            "Fit with scheme='two_batch' or 'cross_fit'."
        )
    ratios = torch.stack(
        [
            torch.cat([part.own / part.other, part.own.sum(0, True) / part.other.sum(0, True)])
            for part in comparisons
        ]
    )
    spread = ratios.std(0) if len(ratios) > 1 else torch.full_like(ratios[0], math.nan)
    *means, scale = ratios.mean(0).tolist()
    *errors, scale_error = (spread / math.sqrt(len(ratios))).tolist()
    return BiasReport(tuple(means), tuple(errors), scale, scale_error)


def _stated(ratio: float, error: float) -> str:
    if math.isnan(ratio):
        return "no curvature on either"
    return f"{ratio:>9.3g}" + ("" if math.isnan(error) else f" ± {error:.2g}")
