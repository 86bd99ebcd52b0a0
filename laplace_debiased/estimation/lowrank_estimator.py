"""Low-rank curvature of a plan: directions, magnitudes along them, and the schemes' averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.lowrank import (
    Eigenpairs,
    JoinedPart,
    RowPass,
    SpanDirections,
    core_root,
    gram_matrix,
    lanczos_eigenpairs,
    matrix_average,
    orthonormal_pairs,
    relative_cutoff,
    span_eigenpairs,
)
from laplace_debiased.data import (
    Batch,
    Draws,
    draw_coefficients,
)
from laplace_debiased.debiasing import Measurement, scheme_plan
from laplace_debiased.estimation.requirements import require_labels, require_logits, rows_sum_to_one
from laplace_debiased.estimation.row_budget import fits_gram, max_gram_samples
from laplace_debiased.estimation.structure import Task
from laplace_debiased.estimation.walking import coefficients_of, effective_samples
from laplace_debiased.likelihoods import LossModel, curvature_columns
from laplace_debiased.network.inputs import select_rows
from laplace_debiased.options import Fisher


@dataclass(frozen=True, eq=False)
class Survey:
    """One forward pass over a plan: all that columns and coefficients are made of.

    Attributes:
        loss: the loss model.
        fisher: which second moment of output gradients.
        outputs: f [M, C], in the order of the walk.
        targets: [M, ...].
        draws: folds, counts and weights of all samples.
        noise: label noise [M, ...] for ``Fisher.MC``.
    """

    loss: LossModel
    fisher: Fisher
    outputs: Tensor
    targets: Tensor
    draws: Draws
    noise: Tensor | None

    def columns(self, index: Tensor | slice) -> Tensor:
        """Columns S [n, C, R] of some samples."""
        noise = None if self.noise is None else self.noise[index]
        return curvature_columns(
            self.loss, self.outputs[index], self.targets[index], self.fisher, noise=noise
        )

    @cached_property
    def n_columns(self) -> int:
        """R."""
        return self.columns(slice(0, 1)).shape[-1]

    @property
    def mean_loss(self) -> float:
        """Mean loss over the draws, weighted like the curvature, in nats."""
        weights = self.draws.counts * self.draws.weights
        losses = self.loss.losses(self.outputs, self.targets).double().cpu()
        return float((losses * weights).sum() / self.draws.counts.sum())

    @property
    def effective_samples(self) -> float:
        """(Σ w h)² / Σ (w h)² over draws, h the trace of each sample's loss Hessian."""
        traces = self.loss.hessian_trace(self.outputs, self.targets).double().cpu()
        return effective_samples((traces * self.draws.weights).repeat_interleave(self.draws.counts))


@dataclass(frozen=True, eq=False)
class MeasuredDirections:
    """One set of k directions with what its own and the held-out samples say, [k] each.

    Attributes:
        own: mean over the draws that gave the directions.
        held_out: mean over the held-out draws.
        magnitudes: the unbiased combination that the posterior takes.
    """

    own: Tensor
    held_out: Tensor
    magnitudes: Tensor


@dataclass(frozen=True, eq=False)
class LowRankEstimator:
    """Estimates low-rank curvature.

    Args:
        row_pass: the network, and how rows are computed.
        task: what the fit works on.
        rank: number of directions; None for all above the cutoff.
    """

    row_pass: RowPass
    task: Task
    rank: int | None

    def estimate(self, survey: Survey) -> tuple[Eigenpairs, list[MeasuredDirections]]:
        """Eigenpairs of the joined folds, and what was measured on the way.

        Raises:
            ValueError: if the rows do not fit in memory and no ``rank`` is given.
            NumericalError: if the curvature is not finite, or vanishes.
        """
        n_rows = len(survey.outputs) * survey.n_columns
        if fits_gram(n_rows, self.row_pass, self.task.options.byte_budget):
            return self._by_gram_matrix(survey)
        return self._by_products(survey, n_rows)

    def survey(self) -> Survey:
        """The first walk: outputs, targets and draws."""
        generator = torch.Generator().manual_seed(self.task.request.seed)
        outputs, targets, noises, parts = [], [], [], []
        for batch in self._batches("outputs"):
            outputs.append(self.row_pass.outputs(batch.inputs))
            targets.append(batch.targets.to(outputs[-1].device))
            self.task.loss.check_targets(outputs[-1], targets[-1])
            parts.append(batch)
            if self.task.options.fisher is Fisher.MC:
                shape = (len(batch), outputs[-1].shape[-1], self.task.options.mc_samples)
                noises.append(self.task.loss.label_noise(shape, generator))
        require_logits(self.task.loss, rows_sum_to_one(torch.cat(outputs)))
        require_labels(torch.cat([self.task.loss.n_labels(part) for part in targets]))
        draws = Draws(
            *(
                torch.cat([getattr(b, name) for b in parts])
                for name in ("folds", "counts", "weights")
            )
        )
        noise = torch.cat(noises).to(outputs[-1].device) if noises else None
        return Survey(
            self.task.loss,
            self.task.options.fisher,
            torch.cat(outputs),
            torch.cat(targets),
            draws,
            noise,
        )

    # -- all rows in memory ----------------------------------------------------------------

    def _by_gram_matrix(self, survey: Survey) -> tuple[Eigenpairs, list[MeasuredDirections]]:
        """Everything from one Gram matrix of all rows; only the final basis is formed."""
        plan, rows = self.task.plan, self._rows(survey)
        gram = gram_matrix(rows)
        cutoff = relative_cutoff(rows.dtype)
        measured, factors = [], []
        for step in scheme_plan(self.task.options.scheme, plan.fold_sizes).measurements:
            own = draw_coefficients(plan, survey.draws, step.direction_folds)
            root = _per_row(own.sqrt(), survey, gram)
            found = span_eigenpairs(gram, root, rank=self.rank, cutoff=cutoff)
            projections = gram @ found.coefficients
            part = self._measure_rows(step, survey, found, projections)
            measured.append(part)
            factors.append(found.coefficients @ core_root(part.magnitudes, step.share))
        joined = span_eigenpairs(gram, torch.cat(factors, 1), rank=self.rank, cutoff=cutoff)
        return orthonormal_pairs(rows, joined), measured

    def _rows(self, survey: Survey) -> Tensor:
        """All rows of a plan [M·R, P], R of them per sample."""
        network = self.row_pass.network
        shape = (len(survey.outputs), survey.n_columns, network.n_params)
        rows = torch.empty(shape, dtype=network.dtype, device=network.device)
        for start, batch in self._positioned("rows"):
            columns = survey.columns(slice(start, start + len(batch)))
            for tile, values in self.row_pass.walk(batch.inputs, columns):
                rows[start : start + len(batch)][tile.samples, tile.columns] = values
        return rows.flatten(0, 1)

    def _measure_rows(
        self,
        step: Measurement,
        survey: Survey,
        found: SpanDirections,
        projections: Tensor,
    ) -> MeasuredDirections:
        plan = self.task.plan
        held_out = draw_coefficients(plan, survey.draws, step.magnitude_folds)
        return MeasuredDirections(
            found.eigenvalues,
            _per_row(held_out, survey, projections) @ projections.square(),
            _per_row(coefficients_of(plan, step, survey.draws), survey, projections)
            @ projections.square(),
        )

    # -- no rows in memory -----------------------------------------------------------------

    def _by_products(
        self, survey: Survey, n_rows: int
    ) -> tuple[Eigenpairs, list[MeasuredDirections]]:
        """Lanczos on GGN-vector products per set of directions, then one walk to measure them."""
        if self.rank is None:
            raise ValueError(self._too_many_rows(n_rows, survey.n_columns))
        plan = self.task.plan
        steps = scheme_plan(self.task.options.scheme, plan.fold_sizes).measurements
        with self.task.clock.stage("products"):
            found = [self._leading(survey, step, self.rank) for step in steps]
        measured = self._measure_products(survey, steps, found)
        parts = [
            JoinedPart(pairs.basis, part.magnitudes, step.share)
            for pairs, part, step in zip(found, measured, steps, strict=True)
        ]
        return matrix_average(parts, self.rank), measured

    def _leading(self, survey: Survey, step: Measurement, rank: int) -> Eigenpairs:
        weights = draw_coefficients(self.task.plan, survey.draws, step.direction_folds)
        roots = weights.sqrt().to(survey.outputs)

        def walk() -> Iterator[tuple[Any, Tensor]]:
            for start, batch in self._positioned(None):
                used = weights[start : start + len(batch)].nonzero().squeeze(-1)
                if len(used):
                    yield select_rows(batch.inputs, used), start + used

        def columns_at(positions: Tensor) -> Tensor:
            return survey.columns(positions) * roots[positions].reshape(-1, 1, 1)

        return lanczos_eigenpairs(
            self.row_pass.network,
            walk,
            columns_at,
            rank,
            seed=self.task.request.seed,
            progress_bar=self.task.request.progress_bar,
        )

    def _measure_products(
        self, survey: Survey, steps: Sequence[Measurement], found: Sequence[Eigenpairs]
    ) -> list[MeasuredDirections]:
        """Directional curvatures in one walk over the rows."""
        plan = self.task.plan
        sums: list[list[Tensor | float]] = [[0.0, 0.0] for _ in steps]
        for start, batch in self._positioned("magnitudes"):
            columns = survey.columns(slice(start, start + len(batch)))
            wanted = [
                (coefficients_of(plan, step, batch), draw_coefficients(plan, batch, folds))
                for step in steps
                for folds in (step.magnitude_folds,)
            ]
            for tile, rows in self.row_pass.walk(batch.inputs, columns):
                for both, pairs, total in zip(wanted, found, sums, strict=True):
                    values = (rows @ pairs.basis).double()
                    n, r, _ = values.shape
                    squares = values.flatten(0, 1).square()
                    for index, coefficients in enumerate(both):
                        per_row = coefficients[tile.samples].to(squares)
                        per_row = per_row.repeat_interleave(r, output_size=n * r)
                        total[index] = total[index] + per_row @ squares
        return [
            MeasuredDirections(pairs.eigenvalues, torch.as_tensor(held), torch.as_tensor(core))
            for pairs, (core, held) in zip(found, sums, strict=True)
        ]

    def _too_many_rows(self, n_rows: int, n_columns: int) -> str:
        fitting = max_gram_samples(n_columns, self.row_pass, self.task.options.byte_budget)
        return (
            f"the {n_rows} curvature rows of the drawn samples do not fit byte_budget="
            f"{self.task.options.byte_budget}. Pass n_samples (at most {fitting} here), a larger "
            "byte_budget, or a rank: that many leading directions are then found without rows."
        )

    # -- walks -----------------------------------------------------------------------------

    def _positioned(self, what: str | None) -> Iterator[tuple[int, Batch]]:
        """Batches with the position of their first sample in the walk."""
        start = 0
        for batch in self._batches(what):
            yield start, batch
            start += len(batch)

    def _batches(self, what: str | None) -> Iterable[Batch]:
        plan = self.task.plan
        return plan.batches() if what is None else self.task.clock.walk(plan, what)


def _per_row(per_sample: Tensor, survey: Survey, like: Tensor) -> Tensor:
    """One value per row [M·R] from one per sample [M]."""
    return per_sample.repeat_interleave(survey.n_columns).to(like)
