"""Two walks over a plan: Kronecker factors of its folds, then magnitudes along eigenbases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature import (
    Chunk,
    CurvaturePass,
    FactorAccumulator,
    KroneckerFactors,
    MagnitudeAccumulator,
)
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.curvature.over_ranks import factors_over_ranks, magnitudes_over_ranks
from laplace_debiased.curvature.passes import Columns
from laplace_debiased.curvature.rows.size import largest_basis
from laplace_debiased.data import Batch
from laplace_debiased.debiasing import Measurement
from laplace_debiased.estimation.columns import (
    SharedNoise,
    columns_per_sample,
    drawing,
    fit_columns,
)
from laplace_debiased.estimation.progress import Progress, Resumable
from laplace_debiased.estimation.structure import Task
from laplace_debiased.estimation.walking import (
    Tally,
    by_fold,
    coefficients_of,
    fold_slices,
    nonzero_slice,
    rows_of,
    scaled_columns,
)
from laplace_debiased.network.forecast import Forecast
from laplace_debiased.network.identity import digest_of
from laplace_debiased.options import SKETCHED_COLUMNS, Magnitudes


@dataclass(frozen=True, eq=False)
class FoldStatistics:
    """What the first walk over a plan gives.

    Attributes:
        factors: per fold, means over its draws.
        mean_loss: mean loss over all draws, in nats.
        n_outputs: C.
        effective_samples: (Σ w h)² / Σ (w h)² over draws, with h the trace of a sample's loss
            Hessian and w its importance weight: how many samples of equal curvature would give
            as steady an estimate of the scale; None where it was not computed.
    """

    factors: tuple[KroneckerFactors, ...]
    mean_loss: float
    n_outputs: int
    effective_samples: float | None = None

    def merged(self, folds: Sequence[int]) -> KroneckerFactors:
        """Factors of some folds together."""
        return KroneckerFactors.merge([self.factors[fold] for fold in folds])


@dataclass(frozen=True, eq=False)
class KronEstimator:
    """Estimates Kronecker curvature with our own pass.

    Args:
        engine: the pass over the network.
        task: what the fit works on.
        sketch: number of columns that stand for the loss Hessian's root; None for all of it.
    """

    engine: CurvaturePass
    task: Task
    sketch: int | None = None

    def fold_statistics(self) -> FoldStatistics:
        """First walk: factors of every fold, and the loss."""
        plan, loss = self.task.plan, self.task.loss
        summed_bias = self.task.options.magnitudes is not Magnitudes.KFAC
        sums = [
            FactorAccumulator(self.task.names, summed_bias=summed_bias, thin=True)
            for _ in plan.fold_sizes
        ]
        tally = Tally()
        walk = self._progress("factors", [*sums, tally])
        for batch, chunk in self._walk("factors", walk, streaming=True):
            part = rows_of(batch, chunk.rows, chunk.outputs.device)
            tally.add(loss, chunk.outputs, part)
            self._add_chunk(sums, chunk, part)
        tally = tally.over_ranks(self.task.ranks)
        factors_over_ranks(self.task.ranks, sums)
        if walk is not None:
            walk.close([*sums, tally])
        tally.require_usable(loss)
        factors = tuple(
            accumulator.means(size) for accumulator, size in zip(sums, plan.fold_sizes, strict=True)
        )
        return FoldStatistics(factors, tally.mean_loss, tally.n_outputs, tally.effective_samples)

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
        for batch, chunk in self._walk("magnitudes", walk, bases=largest):
            part = rows_of(batch, chunk.rows, chunk.outputs.device)
            wanted = [coefficients_of(plan, measurement, part) for measurement in measurements]
            for name, rows in (block for _, tile in chunk.tiles() for block in tile):
                for accumulator, coefficients in zip(sums, wanted, strict=True):
                    used = nonzero_slice(coefficients)
                    if used is not None:
                        accumulator.add(
                            name, rows.select(used), coefficients[used].to(rows.columns)
                        )
        magnitudes_over_ranks(self.task.ranks, sums)
        if walk is not None:
            walk.close(sums)
        return [accumulator.tables() for accumulator in sums]

    def _progress(
        self,
        what: str,
        sums: Sequence[Resumable],
        bases: Sequence[tuple[BlockBasis, ...]] = (),
    ) -> Progress | None:
        """Where a walk is, with its sums set to the checkpoint's; only along the same bases."""
        if self.task.checkpoint is None:
            return None
        values = [v for basis in bases for block in basis for v in vars(block).values()]
        key = digest_of([value for value in values if isinstance(value, Tensor)])
        return self.task.checkpoint.walk(what, sums, self.task.plan, key)

    def _walk(
        self, what: str, walk: Progress | None, **options: Any
    ) -> Iterator[tuple[Batch, Chunk]]:
        """Batches of the plan with their chunks.

        Args:
            what: what is measured, as progress bar and report say it.
            walk: where the walk is.
            options: of the pass's chunks. In a streaming walk columns are scaled by the square
                roots of their samples' weights.
        """
        forecast, weighted = self._forecast(), options.get("streaming", False)
        for batch, columns in self._batches(what, walk):
            if weighted:
                columns = scaled_columns(columns, batch.weights * batch.counts)
            forecast.begin()
            for chunk in self.engine.chunks(
                batch.inputs, columns, n_columns=self._n_columns, **options
            ):
                yield batch, chunk
                if weighted:  # the first walk speaks for both
                    forecast.done(len(chunk.outputs))

    def _forecast(self) -> Forecast:
        """Foretells the walks of a fit from its first chunks."""
        plan, exact = self.task.plan, self.task.options.magnitudes is Magnitudes.GGN
        share = plan.share(self.task.ranks)
        if self._n_columns is None:
            advice = f"columns={SKETCHED_COLUMNS} takes so many backward passes per sample"
        else:
            advice = "A smaller n_samples takes less; subset_of_weights='last_layer' least"
        n_samples = sum(size for part in share.parts for size in part.batch_sizes)
        return Forecast("this fit", (2 if exact else 1) * n_samples, f"{advice}.")

    def _batches(self, what: str, walk: Progress | None) -> Iterator[tuple[Batch, Columns]]:
        """Batches of the plan and their columns; label draws repeat from walk to walk.

        Whoever asks for the next batch is done with the one before.
        """
        if walk is not None and walk.complete:
            return
        plan, request = self.task.plan, self.task.request
        share = plan.share(self.task.ranks) if walk is None else walk.share
        generator = torch.Generator().manual_seed(request.seed)
        noise = SharedNoise(plan, share, request.seed, by_fold=True)
        for unsorted in self.task.clock.walk(share, what):
            if walk is not None and walk.is_behind(unsorted, generator):
                continue
            batch = by_fold(unsorted)
            with torch.no_grad():
                yield batch, self._columns_of(batch, generator, noise)
            if walk is not None:
                walk.add(unsorted, generator)
        if walk is not None:
            walk.finish(generator)

    @property
    def _n_columns(self) -> int | None:
        return columns_per_sample(self.task.options, self.sketch)

    def _columns_of(self, batch: Batch, generator: torch.Generator, shared: SharedNoise) -> Columns:
        loss, options = self.task.loss, self.task.options
        noise: Tensor | None = None

        def columns(outputs: Tensor, rows: slice) -> Tensor:
            nonlocal noise
            targets = batch.targets[rows].to(outputs.device)
            loss.check_targets(outputs, targets)
            draw = drawing(loss, options, outputs, self.sketch)
            if draw is not None and noise is None:
                noise = shared.of(batch, draw, generator)
            drawn = None if noise is None else noise[rows]
            return fit_columns(loss, options.fisher, outputs, targets, drawn, self.sketch)

        return columns
