"""What a walk over a plan does with every batch and chunk, beside the curvature itself.

Draws of labels and signs do not depend on who has which samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from laplace_debiased.data.coefficients import draw_coefficients, magnitude_coefficients
from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.sources import Batch, Draws
from laplace_debiased.debiasing.schemes import Measurement
from laplace_debiased.estimation.structure import Task
from laplace_debiased.likelihoods import curvature_columns, sketched_columns
from laplace_debiased.network.rng import derived_seed
from laplace_debiased.options import CurvatureOptions, Fisher


def fit_columns(task: Task, part: Batch, outputs: Tensor, sketch: int | None) -> Tensor:
    """Columns S [m, C, R] ([m, T, C, R]) of some samples, whose outer products a fit adds up.

    The noise of a sample follows from its place in the plan: in whatever batch, on whatever rank.
    ``sketch`` is the number of columns that stand for the loss Hessian's root; None for all of it.
    """
    loss, options = task.loss, task.options
    if sketch is None and options.fisher is not Fisher.MC:
        return curvature_columns(loss, outputs, part.targets, options.fisher)
    assert part.positions is not None
    seeds = [derived_seed(task.request.seed, "noise", at) for at in part.positions.tolist()]
    if sketch is not None:
        return sketched_columns(loss, outputs, part.targets, torch.tensor(seeds), sketch)
    generator, shape = torch.Generator(), (1, *outputs.shape[1:], options.mc_samples)
    noise = [loss.label_noise(shape, generator.manual_seed(seed)) for seed in seeds]
    return curvature_columns(loss, outputs, part.targets, options.fisher, noise=torch.cat(noise))


def columns_per_sample(options: CurvatureOptions, sketch: int | None) -> int | None:
    """R; None where it is the rank of the loss Hessian's root."""
    match options.fisher:
        case Fisher.TYPE2:
            return sketch
        case Fisher.MC:
            return options.mc_samples
        case Fisher.EMPIRICAL:
            return 1


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


def coefficients_of(plan: CurvaturePlan, measurement: Measurement, part: Draws) -> Tensor:
    """Coefficients c [m] with λ = Σ_n c_n x_n along a measurement's directions.

    Where directions and magnitudes share their folds (``single``) this is the plain mean over
    the draws; else the estimate that is unbiased for the pool's mean given the directions.
    """
    if measurement.direction_folds == measurement.magnitude_folds:
        return draw_coefficients(plan, part, measurement.magnitude_folds)
    return magnitude_coefficients(plan, part, measurement.direction_folds)
