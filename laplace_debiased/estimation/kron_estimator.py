"""Two walks over a plan: Kronecker factors of its folds, then magnitudes along eigenbases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature import (
    Chunk,
    CurvaturePass,
    FactorAccumulator,
    FeaturePass,
    KroneckerFactors,
    MagnitudeAccumulator,
)
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.curvature.over_ranks import factors_over_ranks, magnitudes_over_ranks
from laplace_debiased.curvature.passes import Columns
from laplace_debiased.curvature.rows.size import largest_basis
from laplace_debiased.curvature.softmax_head import SoftmaxHeadRule
from laplace_debiased.data.sources import Batch
from laplace_debiased.debiasing.schemes import Measurement
from laplace_debiased.estimation.checkpoint import Progress, Resumable
from laplace_debiased.estimation.structure import Task
from laplace_debiased.estimation.tally import Tally
from laplace_debiased.estimation.walking import (
    by_fold,
    coefficients_of,
    columns_per_sample,
    fit_columns,
    fold_slices,
    nonzero_slice,
    rows_of,
)
from laplace_debiased.likelihoods import SoftmaxCrossEntropy
from laplace_debiased.network.forecast import Forecast
from laplace_debiased.network.identity import digest_of
from laplace_debiased.options import SKETCHED_COLUMNS, Fisher, Magnitudes

DENSE_UP_TO = 4_096
"""With more classes the factor [C, C] of the outputs is never formed."""


@dataclass(frozen=True, eq=False)
class FoldStatistics:
    """What the first walk over a plan gives: per fold means over its draws."""

    factors: tuple[KroneckerFactors, ...]
    tally: Tally

    def merged(self, folds: Sequence[int]) -> KroneckerFactors:
        """Factors of some folds together."""
        return KroneckerFactors.merge([self.factors[fold] for fold in folds])


@dataclass(frozen=True, eq=False)
class KronEstimator:
    """Estimates Kronecker curvature with our own pass.

    ``sketch``: number of columns that stand for the loss Hessian's root; None for all of it.
    """

    engine: CurvaturePass
    task: Task
    sketch: int | None = None

    def fold_statistics(self) -> FoldStatistics:
        """First walk: factors of every fold, and the loss."""
        plan, loss = self.task.plan, self.task.loss
        summed_bias = self.task.options.magnitudes is not Magnitudes.KFAC
        sums = [
            FactorAccumulator(self.task.coverage.covered, summed_bias=summed_bias, thin=True)
            for _ in plan.fold_sizes
        ]
        tally = Tally()
        walk = self._progress("factors", [*sums, tally])
        for part, chunk in self._walk("factors", walk, streaming=True):
            tally.add(loss, chunk.outputs, part)
            self._add_chunk(sums, chunk, part)
        tally = tally.over_ranks(self.task.ranks)
        factors_over_ranks(self.task.ranks, sums)
        walk.close([*sums, tally])
        tally.require_usable(loss)
        factors = tuple(
            accumulator.means(size) for accumulator, size in zip(sums, plan.fold_sizes, strict=True)
        )
        return FoldStatistics(factors, tally)

    def _add_chunk(self, sums: Sequence[FactorAccumulator], chunk: Chunk, part: Batch) -> None:
        """Add a chunk to the factors of its folds."""
        slices = fold_slices(part.folds)
        repeated = bool((part.counts != 1).any())
        counts = part.counts.to(chunk.outputs) if repeated else None
        for number, column in enumerate(chunk.columns()):
            for fold, rows in slices:
                # A call that does not affect the outputs does so in no column.
                found = zip(chunk.calls, column, strict=True)
                reached = [(call, pulled) for call, pulled in found if pulled is not None]
                calls = [call.with_inputs(itemgetter(rows)) for call, _ in reached]
                if number == 0:
                    sums[fold].add_inputs(calls, None if counts is None else counts[rows])
                pulled_back = [tuple(g[rows] for g in pulled) for _, pulled in reached]
                sums[fold].add_columns(calls, pulled_back)

    def exact_magnitudes(
        self, measurements: Sequence[Measurement], bases: Sequence[tuple[BlockBasis, ...]]
    ) -> list[tuple[Tensor, ...]]:
        """Second walk: directional curvatures along each measurement's eigenbasis."""
        sums = [MagnitudeAccumulator(basis) for basis in bases]
        walk = self._progress("magnitudes", sums, bases)
        plan = self.task.plan
        largest = {group[0].name: largest_basis(group) for group in zip(*bases, strict=True)}
        for part, chunk in self._walk("magnitudes", walk, bases=largest):
            wanted = [coefficients_of(plan, measurement, part) for measurement in measurements]
            for name, rows in (block for _, tile in chunk.tiles() for block in tile):
                for accumulator, coefficients in zip(sums, wanted, strict=True):
                    used = nonzero_slice(coefficients)
                    if used is not None:
                        accumulator.add(
                            name, rows.select(used), coefficients[used].to(rows.columns)
                        )
        magnitudes_over_ranks(self.task.ranks, sums)
        walk.close(sums)
        return [accumulator.tables() for accumulator in sums]

    def _progress(
        self,
        what: str,
        sums: Sequence[Resumable],
        bases: Sequence[tuple[BlockBasis, ...]] = (),
    ) -> Progress:
        """Where a walk is, with its sums set to the checkpoint's; only along the same bases."""
        if self.task.checkpoint is None:
            return Progress(self.task.plan.share(self.task.ranks))
        values = [v for basis in bases for block in basis for v in vars(block).values()]
        key = digest_of([value for value in values if isinstance(value, Tensor)])
        return self.task.checkpoint.walk(what, sums, self.task.plan, key)

    def _walk(self, what: str, walk: Progress, **options: Any) -> Iterator[tuple[Batch, Chunk]]:
        """Chunks of the plan's batches, each with its samples; whoever asks on is done with one.

        ``options`` are of the pass's chunks. In a streaming walk columns are scaled by the square
        roots of their samples' weights.
        """
        if walk.complete:
            return
        forecast, weighted = self._forecast(walk), options.get("streaming", False)
        for unsorted in self.task.clock.walk(walk.share, what):
            if walk.is_behind(unsorted):
                continue
            batch = by_fold(unsorted)
            columns = self._columns_of(batch, weighted=weighted)
            forecast.begin()
            for chunk in self.engine.chunks(
                batch.inputs, columns, n_columns=self._n_columns, **options
            ):
                yield rows_of(batch, chunk.rows, chunk.outputs.device), chunk
                if weighted:  # the first walk speaks for both
                    forecast.done(len(chunk.outputs))
            walk.add(unsorted)
        walk.finish()

    def _forecast(self, walk: Progress) -> Forecast:
        """Foretells the walks of a fit from its first chunks."""
        n_walks = 2 if self.task.options.magnitudes is Magnitudes.GGN else 1
        if self._n_columns is None:
            advice = f"columns={SKETCHED_COLUMNS} takes so many backward passes per sample"
        else:
            advice = "A smaller n_samples takes less; subset_of_weights='last_layer' least"
        return Forecast("this fit", n_walks * sum(walk.share.batch_sizes), f"{advice}.")

    @property
    def _n_columns(self) -> int | None:
        return columns_per_sample(self.task.options, self.sketch)

    def _columns_of(self, batch: Batch, *, weighted: bool) -> Columns:
        def columns(outputs: Tensor, rows: slice) -> Tensor:
            part = rows_of(batch, rows, outputs.device)
            self.task.loss.check_targets(outputs, part.targets)
            found, weights = self._columns(part, outputs), part.weights * part.counts
            if not weighted or bool((weights == 1).all()):
                return found
            return found * weights.sqrt().to(found).reshape(-1, *[1] * (found.ndim - 1))

        return columns

    def _columns(self, part: Batch, outputs: Tensor) -> Tensor:
        return fit_columns(self.task, part, outputs, self.sketch)


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

    def _columns(self, part: Batch, outputs: Tensor) -> Tensor:
        roots = torch.softmax(outputs, dim=-1).sqrt().unsqueeze(-1)
        mask = self.task.loss.label_mask(part.targets)
        return roots if mask is None else roots * mask.reshape(-1, 1, 1)


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
