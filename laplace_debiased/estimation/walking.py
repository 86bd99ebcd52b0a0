"""What a walk over a plan does with every batch and chunk, beside the curvature itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.passes import Columns
from laplace_debiased.data import (
    Batch,
    CurvaturePlan,
    Draws,
    draw_coefficients,
    magnitude_coefficients,
    split_batch,
)
from laplace_debiased.data.loaders import loader_generators
from laplace_debiased.debiasing import Measurement
from laplace_debiased.estimation.requirements import rows_sum_to_one
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.inputs import batch_length, map_tensors, tensor_shapes, tensors_of
from laplace_debiased.network.rng import preserved_rng


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


def first_inputs_of_loader(loader: Any, dict_key_y: str) -> Any:
    """Model inputs of a training loader's first batch; its generators are left as they were.

    Raises:
        ValueError: if the loader is empty.
    """
    with preserved_rng(generators=loader_generators(loader)):
        batch = next(iter(loader), None)
    if batch is None:
        raise ValueError("train_loader is empty.")
    return split_batch(batch, dict_key_y)[0]


def first_inputs_of_plan(plan: CurvaturePlan) -> Any:
    """Model inputs of a plan's first batch; of its first two, where they hold one sample each.

    Whether samples mix shows on two samples only.
    """
    batches = plan.batches()
    try:
        inputs = next(batches).inputs
        following = next(batches, None) if batch_length(inputs) == 1 else None
    finally:
        batches.close()  # type: ignore[attr-defined]
    if following is None or tensor_shapes(inputs) != tensor_shapes(following.inputs):
        return inputs
    return _joined(inputs, following.inputs)


def _joined(inputs: Any, following: Any) -> Any:
    """Both samples in one batch; what is not per sample stays as the first has it."""
    others = tensors_of(following)

    def joined(tensor: Tensor) -> Tensor:
        other = next(others)
        both_single = tensor.ndim > 0 and len(tensor) == 1 == len(other)
        return torch.cat([tensor, other]) if both_single else tensor

    return map_tensors(joined, inputs)


def effective_samples(shares: Tensor) -> float:
    """(Σ s)² / Σ s² of non-negative shares."""
    squares = float(shares.square().sum())
    return float(shares.sum()) ** 2 / squares if squares > 0 else float(len(shares))


def scaled_columns(columns: Columns, weights: Tensor) -> Columns:
    """Columns times the square root of their sample's weight [m]."""
    if bool((weights == 1).all()):
        return columns

    def scaled(outputs: Tensor, rows: slice) -> Tensor:
        found = columns(outputs, rows)
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
