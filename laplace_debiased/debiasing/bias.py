"""The bias that the folds of a fit reveal, without any further pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tables = tuple[Tensor, ...]


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
        block_ratios: the ratio along the top direction by parameter name.
    """

    decile_ratios: tuple[float, ...]
    decile_errors: tuple[float, ...]
    scale_ratio: float
    scale_error: float
    block_ratios: dict[str, float]

    def __str__(self) -> str:
        lines = ["Curvature on the directions' own batch over curvature on other data:"]
        for index, (ratio, error) in enumerate(
            zip(self.decile_ratios, self.decile_errors, strict=True)
        ):
            lines.append(f"  {10 * index:>3}–{10 * index + 10:<3} % {_stated(ratio, error)}")
        lines.append(f"  all       {_stated(self.scale_ratio, self.scale_error)}")
        return "\n".join(lines)


def bias_report(comparisons: Sequence[tuple[Tables, Tables]], names: Sequence[str]) -> BiasReport:
    """Summarise pairs of magnitude tables.

    Args:
        comparisons: per measured eigenbasis, (own, other) tables, one per block.
        names: parameter name of every block.

    Raises:
        ValueError: if there is nothing to compare.
    """
    if not comparisons:
        raise ValueError(
            "bias_report compares a batch with others, but scheme='single' has one batch only. "
            "Fit with scheme='two_batch' or 'cross_fit'."
        )
    deciles, scales = [], []
    for own, other in comparisons:
        own_flat = torch.cat([table.flatten() for table in own]).double()
        other_flat = torch.cat([table.flatten() for table in other]).double()
        order = own_flat.argsort(descending=True)
        parts = zip(
            own_flat[order].tensor_split(10), other_flat[order].tensor_split(10), strict=True
        )
        deciles.append([_ratio(a, b) for a, b in parts])
        scales.append(_ratio(own_flat, other_flat))
    means, errors = zip(
        *(_mean_and_error(column) for column in zip(*deciles, strict=True)), strict=True
    )
    scale, scale_error = _mean_and_error(scales)
    tops = {
        name: sum(_top_ratio(own[i], other[i]) for own, other in comparisons) / len(comparisons)
        for i, name in enumerate(names)
    }
    return BiasReport(means, errors, scale, scale_error, tops)


def _stated(ratio: float, error: float) -> str:
    if math.isnan(ratio):
        return "no curvature on either"
    return f"{ratio:>9.3g}" + ("" if math.isnan(error) else f" ± {error:.2g}")


def _ratio(own: Tensor, other: Tensor) -> float:
    denominator = float(other.sum())
    numerator = float(own.sum())
    if denominator > 0:
        return numerator / denominator
    return math.inf if numerator > 0 else math.nan


def _top_ratio(own: Tensor, other: Tensor) -> float:
    index = int(own.argmax())
    return _ratio(own.flatten()[index : index + 1], other.flatten()[index : index + 1])


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
