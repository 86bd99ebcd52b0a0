"""How large the bias is: ratios per group of neighbouring ranks, with standard errors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.checks import checked_integer
from laplace_debiased.diagnostics.estimates import DirectionalQuadratic, MeanEstimate


@dataclass(frozen=True)
class Ratio:
    """A ratio with its standard error.

    Attributes:
        value: the ratio.
        stderr: its standard error (first order in the errors of its two means; NaN if unknown).
    """

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.stderr:.1g}"


@dataclass(frozen=True)
class BiasRow:
    """Bias of one group of directions. Means over the group, then ratios; None without reference.

    Attributes:
        first: rank of its first direction, from 1.
        last: rank of its last direction.
        own_to_reference: own curvature over reference curvature; 1 without bias.
        other_to_reference: other batch's curvature over reference curvature; expected near 1.
        own_to_other: own curvature over the other batch's.
        slope_kept_by_other: other batch's slope over own slope, along directions in which the own
            slope is positive; 1 without bias, 0 where the own slope was noise.
        slope_kept_by_reference: the same on reference data.
    """

    first: int
    last: int
    own_to_reference: Ratio | None
    other_to_reference: Ratio | None
    own_to_other: Ratio
    slope_kept_by_other: Ratio
    slope_kept_by_reference: Ratio | None


_COLUMNS = (
    ("own_to_reference", "own/ref"),
    ("other_to_reference", "other/ref"),
    ("own_to_other", "own/other"),
    ("slope_kept_by_other", "slope other/own"),
    ("slope_kept_by_reference", "slope ref/own"),
)


@dataclass(frozen=True)
class BiasSummary:
    """Bias ratios per group of ranks; prints as a table.

    Attributes:
        rows: one per group, top ranks first.
        median_own_to_reference: median over directions of own over reference curvature.
        median_other_to_reference: the same for the other batch.
    """

    rows: tuple[BiasRow, ...]
    median_own_to_reference: float | None
    median_other_to_reference: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        shown = [c for c in _COLUMNS if getattr(self.rows[0], c[0]) is not None]
        lines = ["ranks".ljust(9) + "".join(title.rjust(18) for _, title in shown)]
        for row in self.rows:
            cells = "".join(str(getattr(row, name)).rjust(18) for name, _ in shown)
            lines.append(f"{row.first}-{row.last}".ljust(9) + cells)
        return "\n".join(lines)


def summarise(
    own: DirectionalQuadratic,
    other: DirectionalQuadratic,
    reference: DirectionalQuadratic | None,
    n_groups: int = 10,
) -> BiasSummary:
    """Bias ratios of the three quadratics, see `BiasSummary`.

    Errors are those of the other batch and of the reference as samples of their population, given
    the directions: the own batch is then a constant. They say nothing about other own batches.

    Raises:
        ValueError: if ``n_groups`` is not a positive integer.
    """
    n_groups, k = checked_integer("n_groups", n_groups), own.n_directions
    groups = [g for g in torch.arange(k).tensor_split(min(n_groups, k)) if len(g)]
    rows = tuple(_row(group, own, other, reference) for group in groups)
    medians = [
        None if reference is None else float((q.curvature.mean / reference.curvature.mean).median())
        for q in (own, other)
    ]
    return BiasSummary(rows, *medians)


def _row(
    group: Tensor,
    own: DirectionalQuadratic,
    other: DirectionalQuadratic,
    reference: DirectionalQuadratic | None,
) -> BiasRow:
    weights = torch.zeros(own.n_directions, 1, dtype=torch.float64)
    weights[group] = 1.0 / len(group)

    def exact(estimate: MeanEstimate) -> MeanEstimate:
        return MeanEstimate(estimate.mean, torch.zeros_like(estimate.covariance), 0)

    own_curvature = exact(own.curvature.combine(weights))
    own_slope = exact(own.slope.combine(weights))
    other_curvature, other_slope = other.curvature.combine(weights), other.slope.combine(weights)
    curvature = None if reference is None else reference.curvature.combine(weights)
    slope = None if reference is None else reference.slope.combine(weights)
    return BiasRow(
        first=int(group[0]) + 1,
        last=int(group[-1]) + 1,
        own_to_reference=None if curvature is None else _ratio(own_curvature, curvature),
        other_to_reference=None if curvature is None else _ratio(other_curvature, curvature),
        own_to_other=_ratio(own_curvature, other_curvature),
        slope_kept_by_other=_ratio(other_slope, own_slope),
        slope_kept_by_reference=None if slope is None else _ratio(slope, own_slope),
    )


def _ratio(top: MeanEstimate, bottom: MeanEstimate) -> Ratio:
    """Ratio of two independent means; its error by first-order propagation."""
    a, b = float(top.mean[0]), float(bottom.mean[0])
    if b == 0.0:
        return Ratio(float("nan"), float("nan"))
    value = a / b
    return Ratio(
        value, float((top.stderr[0] ** 2 + (value * bottom.stderr[0]) ** 2) ** 0.5) / abs(b)
    )
