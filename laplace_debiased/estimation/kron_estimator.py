"""Two walks over a plan: Kronecker factors of its folds, then magnitudes along eigenbases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.curvature import (
    Chunk,
    ColumnChunk,
    CurvaturePass,
    FactorAccumulator,
    KroneckerFactors,
    MagnitudeAccumulator,
)
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.curvature.passes import Columns, map_calls
from laplace_debiased.data import (
    Batch,
    CurvaturePlan,
    ratio_factor,
)
from laplace_debiased.debiasing import (
    Measurement,
    SchemePlan,
    eigenbasis,
    join_by_rank,
    kfac_magnitudes,
    own_magnitudes,
    scheme_plan,
)
from laplace_debiased.estimation.checkpoint import FitCheckpoint, WalkProgress
from laplace_debiased.estimation.requirements import require_labels, require_logits
from laplace_debiased.estimation.walking import (
    Tally,
    by_fold,
    coefficients_of,
    effective_samples,
    fold_slices,
    nonzero_slice,
    rows_of,
    scaled_columns,
)
from laplace_debiased.likelihoods import LossModel, curvature_columns
from laplace_debiased.network.identity import digest_of
from laplace_debiased.options import CurvatureOptions, Fisher, Magnitudes, Scheme

AnyChunk = TypeVar("AnyChunk", Chunk, ColumnChunk)


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


@dataclass(frozen=True, eq=False)
class KronEstimate:
    """Kronecker curvature of a fit: *per-sample means*, before any scaling to N.

    Attributes:
        basis: the posterior's eigenbasis, one entry per covered parameter.
        tables: magnitudes along it, one table per covered parameter.
        folds: factors of every fold.
        comparisons: per measured eigenbasis, K-FAC tables as its own folds report them and as the
            held-out folds measure them, for the bias report; empty under ``single``.
        mean_loss: mean loss over the draws, in nats.
        n_outputs: C.
        n_samples: draws over which all this was estimated.
        effective_samples: see :class:`FoldStatistics`; of the latest fit, where fits were added.
    """

    basis: tuple[BlockBasis, ...]
    tables: tuple[Tensor, ...]
    folds: tuple[KroneckerFactors, ...]
    comparisons: tuple[tuple[tuple[Tensor, ...], tuple[Tensor, ...]], ...]
    mean_loss: float
    n_outputs: int
    n_samples: int
    effective_samples: float | None = None


@dataclass(frozen=True, eq=False)
class KronEstimator:
    """Estimates Kronecker curvature with our own pass.

    Args:
        curvature_pass: the pass over the network.
        names: covered parameters, in order.
        loss: the loss model.
        options: the choices.
        seed: seed of label draws (``fisher="mc"``).
        progress_bar: show progress over batches.
        checkpoint: where the walks keep what they have so far, or None.
    """

    curvature_pass: CurvaturePass
    names: tuple[str, ...]
    loss: LossModel
    options: CurvatureOptions
    seed: int = 0
    progress_bar: bool = False
    checkpoint: FitCheckpoint | None = None

    def fold_statistics(self, plan: CurvaturePlan) -> FoldStatistics:
        """First walk: factors of every fold, and the loss."""
        summed_bias = self.options.magnitudes is not Magnitudes.KFAC
        sharing = self.options.weight_sharing
        sums = [
            FactorAccumulator(self.names, summed_bias=summed_bias, sharing=sharing)
            for _ in plan.fold_sizes
        ]
        tally = Tally()
        walk = self._progress("Kronecker factors", [*sums, tally])
        chunks = self.curvature_pass.column_chunks
        for batch, chunk in self._walk(plan, "Kronecker factors", walk, chunks, weighted=True):
            part = rows_of(batch, chunk.rows, chunk.outputs.device)
            tally.add(self.loss, chunk.outputs, part)
            self._add_chunk(sums, chunk, part)
        require_labels(torch.cat(tally.labels))
        require_logits(self.loss, torch.cat(tally.sums_to_one))
        factors = tuple(
            accumulator.means(size) for accumulator, size in zip(sums, plan.fold_sizes, strict=True)
        )
        return FoldStatistics(
            factors,
            tally.total_loss / sum(plan.fold_sizes),
            tally.n_outputs,
            effective_samples(torch.cat(tally.shares)),
        )

    def _add_chunk(
        self, sums: Sequence[FactorAccumulator], chunk: ColumnChunk, part: Batch
    ) -> None:
        """Add a chunk to the factors of its folds."""
        slices = fold_slices(part.folds)
        repeated = bool((part.counts != 1).any())
        counts = part.counts.to(chunk.outputs) if repeated else None
        seen: set[str] = set()
        for column in chunk.columns:
            for layer in self.curvature_pass.layers:
                if layer.name not in column:
                    continue
                for fold, rows in slices:
                    inputs = map_calls(itemgetter(rows), chunk.inputs[layer.name])
                    if layer.name not in seen:
                        sums[fold].add_inputs(
                            layer, inputs, None if counts is None else counts[rows]
                        )
                    cotangents = map_calls(itemgetter(rows), column[layer.name])
                    sums[fold].add_column(layer, inputs, cotangents)
                seen.add(layer.name)

    def exact_magnitudes(
        self,
        plan: CurvaturePlan,
        measurements: Sequence[Measurement],
        bases: Sequence[tuple[BlockBasis, ...]],
    ) -> list[tuple[Tensor, ...]]:
        """Second walk: directional curvatures along each measurement's eigenbasis."""
        sums = [MagnitudeAccumulator(basis) for basis in bases]
        walk = self._progress("directional curvature", sums, bases)
        chunks = self.curvature_pass.chunks
        for batch, chunk in self._walk(plan, "directional curvature", walk, chunks):
            part = rows_of(batch, chunk.rows, chunk.outputs.device)
            wanted = [coefficients_of(plan, measurement, part) for measurement in measurements]
            for layer in chunk.layers:
                rows = chunk.layer_rows(layer)
                for accumulator, coefficients in zip(sums, wanted, strict=True):
                    used = nonzero_slice(coefficients)
                    if used is not None:
                        accumulator.add(
                            layer, rows.select(used), coefficients[used].to(rows.columns)
                        )
        return [accumulator.tables() for accumulator in sums]

    def _progress(
        self,
        what: str,
        sums: Sequence[object],
        bases: Sequence[tuple[BlockBasis, ...]] = (),
    ) -> WalkProgress | None:
        """Where a walk is, with its sums set to the checkpoint's; only along the same bases."""
        if self.checkpoint is None:
            return None
        values = [v for basis in bases for block in basis for v in vars(block).values()]
        key = digest_of([value for value in values if isinstance(value, Tensor)])
        return self.checkpoint.walk(what, sums, key)

    def _walk(
        self,
        plan: CurvaturePlan,
        what: str,
        walk: WalkProgress | None,
        chunks: Callable[..., Iterator[AnyChunk]],
        *,
        weighted: bool = False,
    ) -> Iterator[tuple[Batch, AnyChunk]]:
        """Batches of the plan with their chunks.

        Args:
            plan: the plan.
            what: what is measured, for the progress bar.
            walk: where the walk is.
            chunks: of the pass: all columns at once, or one by one.
            weighted: whether a column is scaled by the square root of its sample's weight.
        """
        for batch, columns in self._batches(plan, what, walk):
            if weighted:
                columns = scaled_columns(columns, batch.weights * batch.counts)
            for chunk in chunks(batch.inputs, columns, n_columns=self._n_columns):
                yield batch, chunk

    def _batches(
        self, plan: CurvaturePlan, what: str, walk: WalkProgress | None
    ) -> Iterator[tuple[Batch, Columns]]:
        """Batches of the plan and their columns; label draws repeat from walk to walk.

        Whoever asks for the next batch is done with the one before.
        """
        if walk is not None and walk.complete:
            return
        generator = torch.Generator().manual_seed(self.seed)
        batches: Iterable[Batch] = plan.batches()
        if self.progress_bar:
            batches = tqdm(batches, total=len(plan), desc=f"[{what}]")
        for unsorted in batches:
            if walk is not None and walk.is_behind(unsorted, generator):
                continue
            batch = by_fold(unsorted)
            with torch.no_grad():
                yield batch, self._columns_of(batch, generator)
            if walk is not None:
                walk.add(unsorted, generator)
        if walk is not None:
            walk.finish(generator)

    @property
    def _n_columns(self) -> int | None:
        match self.options.fisher:
            case Fisher.TYPE2:
                return None
            case Fisher.MC:
                return self.options.mc_samples
            case Fisher.EMPIRICAL:
                return 1

    def _columns_of(self, batch: Batch, generator: torch.Generator) -> Columns:
        noise: Tensor | None = None

        def columns(outputs: Tensor, rows: slice) -> Tensor:
            nonlocal noise
            targets = batch.targets[rows].to(outputs.device)
            self.loss.check_targets(outputs, targets)
            if self.options.fisher is Fisher.MC and noise is None:
                shape = (len(batch), *outputs.shape[1:], self.options.mc_samples)
                noise = self.loss.label_noise(shape, generator)
            drawn = None if noise is None else noise[rows]
            return curvature_columns(self.loss, outputs, targets, self.options.fisher, noise=drawn)

        return columns


def joined_estimate(
    statistics: FoldStatistics,
    options: CurvatureOptions,
    fold_sizes: tuple[int, ...],
    estimator: KronEstimator | None,
    plan: CurvaturePlan,
) -> KronEstimate:
    """Directions and magnitudes of a scheme from fold statistics, with a second walk if needed.

    Args:
        statistics: result of the first walk.
        options: the choices.
        fold_sizes: draws per fold.
        estimator: measures exact magnitudes; None where ``options`` asks for ``kfac``.
        plan: the plan of the second walk.
    """
    scheme_steps = scheme_plan(options.scheme, fold_sizes)
    bases = [_basis_of(statistics, step.direction_folds) for step in scheme_steps.measurements]
    held_out = [
        kfac_magnitudes(basis, _merged(statistics, step.magnitude_folds))
        for basis, step in zip(bases, scheme_steps.measurements, strict=True)
    ]
    if options.magnitudes is Magnitudes.KFAC or estimator is None:
        tables = held_out
    else:
        tables = estimator.exact_magnitudes(plan, scheme_steps.measurements, bases)
        held_out_data = options.scheme is not Scheme.SINGLE
        if options.ratio_step and plan.pool is not None and held_out_data:
            tables = [
                _scaled(table, ratio_factor(plan, step.direction_folds))
                for table, step in zip(tables, scheme_steps.measurements, strict=True)
            ]
    biased = options.scheme is Scheme.SINGLE
    return KronEstimate(
        basis=bases[0]
        if scheme_steps.posterior_basis_is_measured
        else posterior_basis(statistics, options.scheme, fold_sizes),
        tables=join_by_rank(tables, [step.share for step in scheme_steps.measurements]),
        folds=statistics.factors,
        comparisons=()
        if biased
        else tuple((own_magnitudes(b), held) for b, held in zip(bases, held_out, strict=True)),
        mean_loss=statistics.mean_loss,
        n_outputs=statistics.n_outputs,
        n_samples=sum(fold_sizes),
        effective_samples=statistics.effective_samples,
    )


def posterior_basis(
    statistics: FoldStatistics, scheme: Scheme, fold_sizes: tuple[int, ...]
) -> tuple[BlockBasis, ...]:
    """The eigenbasis of the posterior under a scheme, one entry per covered parameter."""
    return _basis_of(statistics, scheme_plan(scheme, fold_sizes).posterior_folds)


def _scaled(tables: Sequence[Tensor], factor: float) -> tuple[Tensor, ...]:
    return tuple(table * factor for table in tables)


def _merged(statistics: FoldStatistics, folds: tuple[int, ...]) -> KroneckerFactors:
    return KroneckerFactors.merge([statistics.factors[fold] for fold in folds])


def _basis_of(statistics: FoldStatistics, folds: tuple[int, ...]) -> tuple[BlockBasis, ...]:
    return eigenbasis(_merged(statistics, folds))


__all__ = [
    "FoldStatistics",
    "KronEstimate",
    "KronEstimator",
    "SchemePlan",
    "joined_estimate",
    "posterior_basis",
]
