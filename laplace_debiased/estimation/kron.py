"""The Kronecker structure: eigenbases of factors, and a magnitude for every pair of directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature import (
    BackwardPass,
    Coverage,
    CurvaturePass,
    FeaturePass,
    KroneckerFactors,
    host_coverage,
    inspected,
    operation_coverage,
)
from laplace_debiased.curvature.factors import BlockBasis
from laplace_debiased.curvature.rows.gram import dense
from laplace_debiased.data.loaders import can_draw, sampler_indices
from laplace_debiased.debiasing.bases import eigenbases, kfac_magnitudes, own_magnitudes
from laplace_debiased.debiasing.bias import Comparison, compared
from laplace_debiased.debiasing.schemes import join_by_rank, scheme_plan
from laplace_debiased.estimation.arguments import Arguments, FitRequest
from laplace_debiased.estimation.backends import BackendFactors, check_backend
from laplace_debiased.estimation.kron_estimator import FoldStatistics, KronEstimator, in_closed_form
from laplace_debiased.estimation.kron_state import as_kept, curvature_from_state, curvature_to_state
from laplace_debiased.estimation.plan import first_inputs_of_loader
from laplace_debiased.estimation.structure import Fit, KronCurvature, Task
from laplace_debiased.estimation.target import Target
from laplace_debiased.likelihoods import LossModel
from laplace_debiased.network.memory import working_memory
from laplace_debiased.operators import EigenBlock, EigenKron
from laplace_debiased.options import Magnitudes, Sampling, Scheme
from laplace_debiased.parallel.jobs import shared_out
from laplace_debiased.predictive import KronPredictor, LastLayerKronPredictor, Predictor

RECOMMENDED_SAMPLES = 256
"""Samples of curvature for a posterior over all weights.

On the benchmark networks the mean divergence from the full-data posterior falls as 1/m; at 256 it
is below 1e-3 nats per prediction with room for an unlucky draw, and the forward pass over the pool,
which does not depend on m, is still the larger half of a fit (see the README).
"""

RECOMMENDED_LAST_LAYER_SAMPLES = 2_048
"""The same for a last layer: its curvature costs forward passes alone."""

RECOMMENDED_SKETCHED_SAMPLES = 768
"""With two sketched columns each: three times as many samples of as many signs are as steady."""


@dataclass(frozen=True, eq=False)
class KronStructure:
    """Kronecker curvature from our own pass, or its factors from a laplace-torch backend."""

    arguments: Arguments
    takes_positions = True

    @property
    def resumes(self) -> bool:
        """Whether a fit can go on from a checkpoint: with our own pass."""
        return self.arguments.backend is None

    def coverage(self, target: Target, chosen: Coverage | None = None) -> Coverage:
        """What may be covered, once: many freeze the whole network when training is over."""
        if chosen is not None and target.last_layer is None:
            return chosen
        backend = self.arguments.backend
        if target.last_layer is not None:
            coverage = target.last_layer_coverage(chosen)
        elif backend is not None:
            coverage, _ = host_coverage(target.model)
        else:
            coverage = operation_coverage(target.model)
        if backend is not None:
            check_backend(backend.kind, target.model, coverage)
        return coverage

    def engine(self, target: Target, coverage: Coverage) -> CurvaturePass:
        """A backward pass per column; for a last layer its features."""
        byte_budget = working_memory(self.arguments.options.byte_budget, target.device)
        if target.last_layer is not None:
            return target.feature_pass(coverage, byte_budget)
        return BackwardPass(target.model, coverage.covered, byte_budget, coverage.general)

    def recommended_samples(
        self, engine: CurvaturePass, request: FitRequest, loss: LossModel
    ) -> int | None:
        """256 (2,048 for a last layer) where the loader can be drawn from and holds more.

        768 where the loss Hessians' roots are sketched.
        """
        if not request.override or not can_draw(request.train_loader):
            return None
        n_data, recommended = len(sampler_indices(request.train_loader)), RECOMMENDED_SAMPLES
        if isinstance(engine, FeaturePass):
            recommended = RECOMMENDED_LAST_LAYER_SAMPLES
        elif n_data > recommended:
            inputs = first_inputs_of_loader(request.train_loader, request.keys)
            sketch = self.arguments.options.sketched(engine.output_shape(inputs).numel())
            recommended = RECOMMENDED_SAMPLES if sketch is None else RECOMMENDED_SKETCHED_SAMPLES
        return recommended if n_data > recommended else None

    def inspect(
        self, engine: CurvaturePass, target: Target, inputs: Any, coverage: Coverage
    ) -> Coverage:
        """What one look at what the network does with its parameters leaves."""
        if target.last_layer is None:
            return inspected(target.model, coverage, inputs)
        if self.arguments.backend is not None:
            # It differentiates the whole network, and would not see that its outputs are not the
            # last layer's. Our own pass checks every batch.
            engine.outputs(inputs)
        return coverage

    def estimate(self, engine: CurvaturePass, task: Task) -> Fit:
        """Fold statistics, eigenbases, and magnitudes along them as the scheme says.

        Added factors are means weighted by the number of draws (same N), or by N where the new
        data extend the training set. Magnitudes that came from factors follow from the merged
        factors; measured ones are averaged at equal ranks with the same weights. Draws by curvature
        may repeat samples of the earlier fit, so they are measured along directions of their own:
        along merged ones a sample could measure a direction that it has chosen before.
        """
        sketch = None
        if isinstance(engine, BackwardPass):
            own = 0 if task.sample is None else engine.output_shape(task.sample).numel()
            sketch = task.options.sketched(max(task.ranks.gathered("outputs", own)))
        estimator = in_closed_form(KronEstimator(engine, task, sketch))
        with torch.no_grad():
            backend, walk = self.arguments.backend, estimator.fold_statistics
            if backend is not None and task.options.magnitudes is Magnitudes.KFAC:
                walk = BackendFactors(backend, task).fold_statistics
            new = walk()
            if task.earlier is None:
                curvature, comparisons = _measured(new, estimator, task)
            else:
                curvature, comparisons = _added(task.earlier, new, estimator, task)
            # The same to the bit on every rank: products differ in their last digits from one
            # machine to another, and even with where in memory a matrix lies.
            *tables, comparisons = task.ranks.from_first(
                "the magnitudes", lambda: [*curvature.tables, comparisons]
            )
            folds = tuple(as_kept(fold, curvature.basis) for fold in curvature.folds)
            curvature = replace(curvature, tables=tuple(tables), folds=folds)
        return task.result(curvature, comparisons, new.tally)

    def predictor(self, engine: CurvaturePass, fit: Fit) -> Predictor:
        """From N·λ in the posterior's eigenbasis."""
        curvature = fit.curvature
        summed = EigenKron(
            tuple(
                EigenBlock(block.output_basis, block.input_basis, table * float(fit.n_data))
                for block, table in zip(curvature.basis, curvature.tables, strict=True)
            )
        )
        if isinstance(engine, FeaturePass):
            return LastLayerKronPredictor(engine, fit.coverage.covered, summed)
        return KronPredictor(engine, fit.coverage.covered, summed)

    def to_state(self, fit: Fit) -> dict[str, Any]:
        """Eigenbases, tables, and factors of the folds."""
        return curvature_to_state(fit.curvature)

    def from_state(self, state: Mapping[str, Any], device: torch.device) -> KronCurvature:
        """Curvature of :meth:`to_state`.

        Raises:
            ValueError: if a table does not fit its eigenbasis.
        """
        return curvature_from_state(tuple(state["covered"]), state, device)


def _measured(
    statistics: FoldStatistics, estimator: KronEstimator, task: Task
) -> tuple[KronCurvature, tuple[Comparison, ...]]:
    """Directions and magnitudes of a scheme, with a second walk if they are exact."""
    options, scheme = task.options, scheme_plan(task.options.scheme, task.plan.fold_sizes)
    steps = scheme.measurements
    bases = _directions(statistics, [step.direction_folds for step in steps], task)
    held_out = [
        kfac_magnitudes(basis, statistics.merged(step.magnitude_folds))
        for basis, step in zip(bases, steps, strict=True)
    ]
    match options.magnitudes:
        case Magnitudes.KFAC:
            tables = held_out
        case Magnitudes.GGN:
            tables = estimator.exact_magnitudes(steps, bases)
    comparisons: tuple[Comparison, ...] = ()
    if options.scheme is not Scheme.SINGLE:
        comparisons = tuple(
            compared(own_magnitudes(basis), held, [block.multiplicities() for block in basis])
            for basis, held in zip(bases, held_out, strict=True)
        )
    basis = bases[0]
    if [step.direction_folds for step in steps] != [scheme.posterior_folds]:
        [basis] = _directions(statistics, [scheme.posterior_folds], task)
    joined = join_by_rank(tables, [step.share for step in steps], bases, basis)
    return KronCurvature(basis, joined, statistics.factors), comparisons


def _directions(
    statistics: FoldStatistics, sets: Sequence[Sequence[int]], task: Task
) -> list[tuple[BlockBasis, ...]]:
    """Eigenbases of sets of folds."""
    watched = task.clock.decomposed
    run = partial(shared_out, ranks=task.ranks, what="eigenbases", watched=watched)
    return eigenbases([statistics.merged(folds) for folds in sets], task.options.max_rank, run)


def _added(
    fit: Fit, new: FoldStatistics, estimator: KronEstimator, task: Task
) -> tuple[KronCurvature, tuple[Comparison, ...]]:
    """A new fit's statistics added to an earlier fit."""
    options, sizes = task.options, task.plan.fold_sizes
    old: KronCurvature = fit.curvature
    if fit.scheme is not options.scheme or len(old.folds) != len(sizes):
        raise ValueError(
            f"override=False adds to a fit with scheme={fit.scheme.value!r} and {len(old.folds)} "
            f"folds, but this one has scheme={options.scheme.value!r} and {len(sizes)}."
        )
    weights, n_draws = task.weights(fit), (fit.n_samples, sum(sizes))
    merged = replace(
        new,
        factors=tuple(
            KroneckerFactors.merge(
                [
                    replace(part, n_samples=part.n_samples * weight / n)
                    for part, weight, n in zip(parts, weights, n_draws, strict=True)
                ]
            )
            for parts in zip(old.folds, new.factors, strict=True)
        ),
    )
    if task.is_drawn and options.sampling is Sampling.CURVATURE:
        measured, comparisons = _measured(new, estimator, task)
        comparisons = (*fit.comparisons, *comparisons)
        [basis] = _directions(merged, [scheme_plan(options.scheme, sizes).posterior_folds], task)
    else:
        measured, comparisons = _measured(merged, estimator, task)
        basis = measured.basis
    tables = measured.tables
    if options.magnitudes is Magnitudes.GGN:
        shares = [weight / sum(weights) for weight in weights]
        bases = [old.basis, measured.basis]
        tables = join_by_rank([old.tables, tables], shares, bases, basis)
    scale = sum(n_draws) / sum(weights)
    folds = tuple(replace(fold, n_samples=fold.n_samples * scale) for fold in merged.factors)
    return KronCurvature(basis, tables, folds), comparisons


def posterior_factors(fit: Fit) -> list[list[Tensor]]:
    """The posterior directions' factors as laplace-torch keeps them: [N·B, A] and [N·B]."""
    folds: Sequence[KroneckerFactors] = fit.curvature.folds
    scheme = scheme_plan(fit.scheme, tuple(int(fold.n_samples) for fold in folds))
    merged = KroneckerFactors.merge([folds[index] for index in scheme.posterior_folds])
    inputs = [[] if block.input is None else [dense(block.input)] for block in merged.blocks]
    return [
        [dense(block.output) * fit.n_data, *sides]
        for block, sides in zip(merged.blocks, inputs, strict=True)
    ]
