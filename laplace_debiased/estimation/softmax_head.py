"""Estimates of a last layer under a softmax, in closed form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_debiased.curvature import FeaturePass
from laplace_debiased.curvature.passes import Columns
from laplace_debiased.curvature.softmax_head import SoftmaxHeadRule
from laplace_debiased.data import Batch
from laplace_debiased.estimation.columns import SharedNoise
from laplace_debiased.estimation.kron_estimator import FoldStatistics, KronEstimator
from laplace_debiased.likelihoods import SoftmaxCrossEntropy
from laplace_debiased.options import SKETCHED_COLUMNS, Fisher

DENSE_UP_TO = 4_096
"""With more classes the factor [C, C] of the outputs is never formed: see below."""


@dataclass(frozen=True, eq=False)
class SoftmaxHeadEstimator(KronEstimator):
    """The estimator whose columns are √p, one per sample, and stand for a whole root.

    Attributes:
        directions: takes the first walk where C is large: its factors are kept as the rows of
            sketched columns, and give a thin eigenbasis. Curvature along it is measured in closed
            form all the same, so that the sketch costs no bias and no noise of magnitudes.
    """

    directions: KronEstimator | None = None

    def fold_statistics(self) -> FoldStatistics:
        """First walk: factors of every fold, and the loss."""
        if self.directions is not None:
            return self.directions.fold_statistics()
        return super().fold_statistics()

    @property
    def _n_columns(self) -> int:
        return 1

    def _columns_of(self, batch: Batch, generator: torch.Generator, shared: SharedNoise) -> Columns:
        def columns(outputs: Tensor, rows: slice) -> Tensor:
            targets = batch.targets[rows].to(outputs.device)
            self.task.loss.check_targets(outputs, targets)
            roots = torch.softmax(outputs, dim=-1).sqrt().unsqueeze(-1)
            mask = self.task.loss.label_mask(targets)
            return roots if mask is None else roots * mask.reshape(-1, 1, 1)

        return columns


def in_closed_form(estimator: KronEstimator) -> KronEstimator:
    """The same estimator in closed form where there is one: softmax, type-2 Fisher, features."""
    engine, task = estimator.engine, estimator.task
    if not (
        isinstance(engine, FeaturePass)
        and isinstance(task.loss, SoftmaxCrossEntropy)
        and task.options.fisher is Fisher.TYPE2
    ):
        return estimator
    directions = None
    if engine.n_outputs > DENSE_UP_TO:
        directions = replace(estimator, sketch=SKETCHED_COLUMNS)
    closed = replace(engine, rule=SoftmaxHeadRule())
    return SoftmaxHeadEstimator(closed, task, directions=directions)
