"""What a walk over a plan does with every batch and chunk, beside the curvature itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.passes import Columns, written_out
from laplace_debiased.data import (
    Batch,
    CurvaturePlan,
    Draws,
    draw_coefficients,
    magnitude_coefficients,
)
from laplace_debiased.debiasing import Measurement
from laplace_debiased.estimation.requirements import rows_sum_to_one
from laplace_debiased.likelihoods import LossModel


@dataclass
class Tally:
    """What the first walk adds up beside the factors.

    Attributes:
        total_loss: weighted loss over the draws so far.
        n_outputs: C.
        shares: per chunk, weight times trace of the loss Hessian of every draw.
        labels: per chunk, number of labels of every sample.
        sums_to_one: per chunk, whether every sample's outputs look like probabilities.
    """

    total_loss: float = 0.0
    n_outputs: int = 0
    shares: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    sums_to_one: list[Tensor] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """The sums so far, to be given to :meth:`restore`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, list(value) if isinstance(value, list) else value)

    def add(self, loss: LossModel, outputs: Tensor, part: Batch) -> None:
        """Add a chunk."""
        losses = loss.losses(outputs, part.targets).double()
        weights = (part.weights * part.counts).to(losses)
        self.total_loss += float((losses * weights).sum())
        traces = loss.hessian_trace(outputs, part.targets).double()
        self.shares.append(
            (traces * part.weights.to(traces)).repeat_interleave(part.counts.to(traces.device))
        )
        self.n_outputs = outputs.shape[-1]
        self.labels.append(loss.n_labels(part.targets))
        self.sums_to_one.append(rows_sum_to_one(outputs))


def effective_samples(shares: Tensor) -> float:
    """(Σ s)² / Σ s² of non-negative shares."""
    squares = float(shares.square().sum())
    return float(shares.sum()) ** 2 / squares if squares > 0 else float(len(shares))


def scaled_columns(columns: Columns, weights: Tensor) -> Columns:
    """Columns times the square root of their sample's weight [m]."""
    if bool((weights == 1).all()):
        return columns

    def scaled(outputs: Tensor, rows: slice) -> Tensor:
        found = written_out(columns(outputs, rows))
        return found * weights[rows].sqrt().to(found).reshape(-1, *[1] * (found.ndim - 1))

    return scaled


def by_fold(batch: Batch) -> Batch:
    """The batch with its samples in the order of their folds, so that a fold is a slice."""
    if bool((batch.folds.diff() >= 0).all()):
        return batch
    return batch.select(batch.folds.argsort(stable=True))


def rows_of(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """A chunk's share of a batch, without the inputs; targets on the device of the outputs."""
    part = replace(batch, inputs=None).select(rows)
    return replace(part, targets=part.targets.to(device))


def fold_slices(folds: Tensor) -> list[tuple[int, slice]]:
    """Where each fold sits in a chunk whose folds ascend."""
    present, lengths = folds.unique_consecutive(return_counts=True)
    ends = lengths.cumsum(0).tolist()
    return [
        (fold, slice(end - length, end))
        for fold, length, end in zip(present.tolist(), lengths.tolist(), ends, strict=True)
    ]


def nonzero_slice(coefficients: Tensor) -> slice | None:
    """From the first to the last coefficient that is not zero."""
    index = coefficients.nonzero()
    return slice(int(index[0]), int(index[-1]) + 1) if len(index) else None


def coefficients_of(plan: CurvaturePlan, measurement: Measurement, part: Batch | Draws) -> Tensor:
    """Coefficients c [m] with λ = Σ_n c_n x_n along a measurement's directions.

    Where directions and magnitudes share their folds (``single``) this is the plain mean over
    the draws; else the estimate that is unbiased for the pool's mean given the directions.
    """
    if measurement.direction_folds == measurement.magnitude_folds:
        return draw_coefficients(plan, part, measurement.magnitude_folds)
    return magnitude_coefficients(plan, part, measurement.direction_folds)
