"""What a walk over a plan does with every batch and chunk, beside the curvature itself.

Draws of labels and signs do not depend on who has which samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.data.coefficients import draw_coefficients, magnitude_coefficients
from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.sources import Batch, Draws
from laplace_debiased.debiasing.schemes import Measurement
from laplace_debiased.estimation.structure import Task
from laplace_debiased.likelihoods import (
    LossModel,
    SoftmaxCrossEntropy,
    curvature_columns,
    sketched_columns,
)
from laplace_debiased.likelihoods.losses import Bernoulli
from laplace_debiased.network.rng import derived_seed
from laplace_debiased.options import CurvatureOptions, Fisher
from laplace_debiased.parallel.ranks import Ranks


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


@dataclass
class Tally:
    """What the first walk adds up beside the factors.

    Attributes:
        total_loss: weighted loss over the draws so far.
        share: Σ over draws of weight times trace of the loss Hessian.
        squared_share: Σ of its square.
        n_draws: draws.
        n_samples: samples; one that was drawn twice counts once.
        n_labelled: samples with a label that counts.
        n_summing_to_one: samples whose outputs look like probabilities.
        probability_evidence: of binary labels, that their outputs are probabilities, in nats.
        n_outputs: C.
    """

    total_loss: float = 0.0
    share: float = 0.0
    squared_share: float = 0.0
    n_draws: int = 0
    n_samples: int = 0
    n_labelled: int = 0
    n_summing_to_one: int = 0
    probability_evidence: float = 0.0
    n_outputs: int = 0

    def state(self) -> dict[str, Any]:
        """The sums so far, to be given to :meth:`restore`."""
        return asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what another's :meth:`state` holds."""
        for name, value in state.items():
            before = getattr(self, name)
            setattr(self, name, max(before, value) if name == "n_outputs" else before + value)

    def over_ranks(self, ranks: Ranks) -> Tally:
        """That of all ranks."""
        total = Tally()
        for state in ranks.gathered("the loss", self.state()):
            total.restore(state)
        return total

    def add(self, loss: LossModel, outputs: Tensor, part: Batch) -> None:
        """Add the outputs of some samples."""
        losses = loss.losses(outputs, part.targets).double()
        counts, weights = part.counts.to(losses.device), part.weights.to(losses)
        shares = loss.hessian_trace(outputs, part.targets).double() * weights
        self.total_loss += float((losses * weights * counts).sum())
        self.share += float((shares * counts).sum())
        self.squared_share += float((shares.square() * counts).sum())
        self.n_draws += int(counts.sum())
        self.n_samples += len(outputs)
        self.n_labelled += int((loss.n_labels(part.targets) > 0).sum())
        self.n_summing_to_one += int(_rows_sum_to_one(outputs).sum())
        if isinstance(loss, Bernoulli):
            self.probability_evidence += loss.probability_evidence(outputs, part.targets)
        self.n_outputs = outputs.shape[-1]

    def require_usable(self, loss: LossModel) -> None:
        """Check labels and outputs of a whole walk.

        Raises:
            ValueError: if no label counts, or the outputs are probabilities already.
        """
        if not self.n_labelled:
            raise ValueError(
                f"none of the {self.n_samples} samples has a label that counts: every target is "
                "ignore_index. Check the labels, or ignore_index."
            )
        if isinstance(loss, Bernoulli):
            loss.require_logits(self.probability_evidence)
        # Softmax of a softmax is a silent error: all that the loss sees are logits between 0 and 1.
        # That every row of many sums to one by chance is out of the question.
        logits = not isinstance(loss, SoftmaxCrossEntropy) or loss.allow_probabilities
        if not logits and self.n_samples > 1 and self.n_summing_to_one == self.n_samples:
            raise ValueError(
                f"the model's outputs are probabilities: those of all {self.n_samples} samples sum "
                "to one. likelihood='classification' takes logits; remove the softmax at the "
                "model's end. If these are logits nevertheless, pass allow_probabilities=True."
            )

    @property
    def mean_loss(self) -> float:
        """Mean loss over the draws, weighted like the curvature, in nats."""
        return self.total_loss / self.n_draws

    @property
    def effective_samples(self) -> float:
        """(Σ w h)² / Σ (w h)² over draws, h the trace of each sample's loss Hessian."""
        return self.share**2 / self.squared_share if self.squared_share > 0 else self.n_draws


def _rows_sum_to_one(outputs: Tensor) -> Tensor:
    """Whether all outputs [m, C] ([m, T, C]) of a sample are non-negative and sum to one [m]."""
    rows = outputs.detach()
    resolution = max(1e-5, 4 * torch.finfo(rows.dtype).eps)
    sums_to_one = (rows >= 0).all(-1) & ((rows.sum(-1) - 1).abs() <= resolution)
    return sums_to_one.reshape(len(rows), -1).all(-1)


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
