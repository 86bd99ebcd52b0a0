"""Low-rank curvature of a plan: directions, magnitudes along them, and the schemes' averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

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
    CurvaturePlan,
    Draws,
    draw_coefficients,
    ratio_factor,
)
from laplace_debiased.debiasing import Measurement, scheme_plan
from laplace_debiased.estimation.lowrank_budget import fits_gram, max_gram_samples
from laplace_debiased.estimation.requirements import require_labels, require_logits, rows_sum_to_one
from laplace_debiased.estimation.walking import coefficients_of, effective_samples
from laplace_debiased.likelihoods import LossModel, curvature_columns
from laplace_debiased.network.inputs import select_rows
from laplace_debiased.options import CurvatureOptions, Fisher, Magnitudes


@dataclass(frozen=True, eq=False)
class LowRankEstimate:
    """Low-rank curvature of a fit: a *per-sample mean*, before any scaling to N.

    Attributes:
        pairs: eigenpairs.
        comparisons: per set of directions that was measured, curvature along them as their own
            samples report it and as held-out samples measure it [k] each; empty under ``single``.
        mean_loss: mean loss over the draws, in nats.
        n_outputs: C.
        n_samples: draws over which all this was estimated.
        effective_samples: (Σ w h)² / Σ (w h)² over draws, with h the trace of a sample's loss
            Hessian and w its importance weight: how many samples of equal curvature would give as
            steady an estimate of the scale; of the latest fit, None where a state was loaded.
    """

    pairs: Eigenpairs
    comparisons: tuple[tuple[Tensor, Tensor], ...]
    mean_loss: float
    n_outputs: int
    n_samples: int
    effective_samples: float | None = None


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
class _Measured:
    """One set of directions with what its own and the held-out samples say."""

    own: Tensor
    held_out: Tensor
    core: Tensor


@dataclass(frozen=True, eq=False)
class LowRankEstimator:
    """Estimates low-rank curvature.

    Args:
        row_pass: the network, and how rows are computed.
        loss: the loss model.
        options: the choices; ``options.scheme`` is resolved.
        rank: number of directions; None for all above the cutoff.
        seed: seed of label draws and of Lanczos' start.
        progress_bar: show progress.
    """

    row_pass: RowPass
    loss: LossModel
    options: CurvatureOptions
    rank: int | None
    seed: int = 0
    progress_bar: bool = False

    def estimate(self, plan: CurvaturePlan) -> LowRankEstimate:
        """Walk a plan and join its folds.

        Raises:
            ValueError: if the rows do not fit in memory and no ``rank`` is given.
            NumericalError: if the curvature is not finite, or vanishes.
        """
        survey = self.survey(plan)
        n_rows = len(survey.outputs) * survey.n_columns
        if fits_gram(n_rows, self.row_pass, self.options.byte_budget):
            pairs, measured = self._by_gram_matrix(plan, survey)
        else:
            pairs, measured = self._by_products(plan, survey, n_rows)
        steps = scheme_plan(self.options.scheme, plan.fold_sizes).measurements
        biased = steps[0].direction_folds == steps[0].magnitude_folds
        return LowRankEstimate(
            pairs,
            () if biased else tuple((part.own, part.held_out) for part in measured),
            survey.mean_loss if plan.pool is None else float(plan.pool.losses.mean()),
            survey.outputs.shape[-1],
            sum(plan.fold_sizes),
            survey.effective_samples,
        )

    def survey(self, plan: CurvaturePlan) -> Survey:
        """The first walk: outputs, targets and draws."""
        generator = torch.Generator().manual_seed(self.seed)
        outputs, targets, noises, parts = [], [], [], []
        for batch in self._batches(plan, "outputs"):
            outputs.append(self.row_pass.outputs(batch.inputs))
            targets.append(batch.targets.to(outputs[-1].device))
            self.loss.check_targets(outputs[-1], targets[-1])
            parts.append(batch)
            if self.options.fisher is Fisher.MC:
                shape = (len(batch), outputs[-1].shape[-1], self.options.mc_samples)
                noises.append(self.loss.label_noise(shape, generator))
        require_logits(self.loss, rows_sum_to_one(torch.cat(outputs)))
        require_labels(torch.cat([self.loss.n_labels(part) for part in targets]))
        draws = Draws(
            *(
                torch.cat([getattr(b, name) for b in parts])
                for name in ("folds", "counts", "weights")
            )
        )
        noise = torch.cat(noises).to(outputs[-1].device) if noises else None
        return Survey(
            self.loss, self.options.fisher, torch.cat(outputs), torch.cat(targets), draws, noise
        )

    # -- all rows in memory ----------------------------------------------------------------

    def _by_gram_matrix(
        self, plan: CurvaturePlan, survey: Survey
    ) -> tuple[Eigenpairs, list[_Measured]]:
        """Everything from one Gram matrix of all rows; only the final basis is formed."""
        rows = self._rows(plan, survey)
        gram = gram_matrix(rows)
        cutoff = relative_cutoff(rows.dtype)
        measured, factors = [], []
        for step in scheme_plan(self.options.scheme, plan.fold_sizes).measurements:
            own = draw_coefficients(plan, survey.draws, step.direction_folds)
            root = _per_row(own.sqrt(), survey, gram)
            found = span_eigenpairs(gram, root, rank=self.rank, cutoff=cutoff)
            projections = gram @ found.coefficients
            part = self._measure_rows(plan, step, survey, found, projections)
            measured.append(part)
            factors.append(found.coefficients @ core_root(part.core, step.share))
        joined = span_eigenpairs(gram, torch.cat(factors, 1), rank=self.rank, cutoff=cutoff)
        return orthonormal_pairs(rows, joined), measured

    def _rows(self, plan: CurvaturePlan, survey: Survey) -> Tensor:
        """All rows of a plan [M·R, P], R of them per sample."""
        network = self.row_pass.network
        shape = (len(survey.outputs), survey.n_columns, network.n_params)
        rows = torch.empty(shape, dtype=network.dtype, device=network.device)
        for start, batch in self._positioned(plan, "rows"):
            columns = survey.columns(slice(start, start + len(batch)))
            for tile, values in self.row_pass.walk(batch.inputs, columns):
                rows[start : start + len(batch)][tile.samples, tile.columns] = values
        return rows.flatten(0, 1)

    def _measure_rows(
        self,
        plan: CurvaturePlan,
        step: Measurement,
        survey: Survey,
        found: SpanDirections,
        projections: Tensor,
    ) -> _Measured:
        held_out = draw_coefficients(plan, survey.draws, step.magnitude_folds)
        return _Measured(
            found.eigenvalues,
            _per_row(held_out, survey, projections) @ projections.square(),
            self._core(
                _per_row(self._coefficients(plan, step, survey.draws), survey, projections),
                projections,
            ),
        )

    def _core(self, coefficients: Tensor, projections: Tensor) -> Tensor:
        """M = Σ_i c_i p_i p_iᵀ over rows i, or its diagonal."""
        if self.options.magnitudes is Magnitudes.RAYLEIGH_RITZ:
            return projections.T @ (coefficients[:, None] * projections)
        return coefficients @ projections.square()

    def _coefficients(self, plan: CurvaturePlan, step: Measurement, part: Batch | Draws) -> Tensor:
        """Coefficients c [m] with λ = Σ_n c_n x_n along a measurement's directions."""
        value = coefficients_of(plan, step, part)
        held_out = step.direction_folds != step.magnitude_folds
        if held_out and self.options.ratio_step and plan.pool is not None:
            value = value * ratio_factor(plan, step.direction_folds)
        return value

    # -- no rows in memory -----------------------------------------------------------------

    def _by_products(
        self, plan: CurvaturePlan, survey: Survey, n_rows: int
    ) -> tuple[Eigenpairs, list[_Measured]]:
        """Lanczos on GGN-vector products per set of directions, then one walk to measure them."""
        if self.rank is None:
            raise ValueError(self._too_many_rows(n_rows, survey.n_columns))
        steps = scheme_plan(self.options.scheme, plan.fold_sizes).measurements
        found = [self._leading(plan, survey, step, self.rank) for step in steps]
        measured = self._measure_products(plan, survey, steps, found)
        parts = [
            JoinedPart(pairs.basis, part.core, step.share)
            for pairs, part, step in zip(found, measured, steps, strict=True)
        ]
        return matrix_average(parts, self.rank), measured

    def _leading(
        self, plan: CurvaturePlan, survey: Survey, step: Measurement, rank: int
    ) -> Eigenpairs:
        weights = draw_coefficients(plan, survey.draws, step.direction_folds)
        roots = weights.sqrt().to(survey.outputs)

        def walk() -> Iterator[tuple[Any, Tensor]]:
            for start, batch in self._positioned(plan, None):
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
            seed=self.seed,
            progress_bar=self.progress_bar,
        )

    def _measure_products(
        self,
        plan: CurvaturePlan,
        survey: Survey,
        steps: Iterable[Measurement],
        found: list[Eigenpairs],
    ) -> list[_Measured]:
        """Directional curvatures in one walk, from rows that are not kept."""
        steps = list(steps)
        cores: list[Tensor | float] = [0.0 for _ in steps]
        held_out: list[Tensor | float] = [0.0 for _ in steps]
        for start, batch in self._positioned(plan, "directional curvature"):
            columns = survey.columns(slice(start, start + len(batch)))
            coefficients = [
                (
                    self._coefficients(plan, step, batch),
                    draw_coefficients(plan, batch, step.magnitude_folds),
                )
                for step in steps
            ]
            for tile, rows in self.row_pass.walk(batch.inputs, columns):
                n, r, _ = rows.shape
                for index, pairs in enumerate(found):
                    flat = (rows @ pairs.basis).double().flatten(0, 1)
                    c, o = (
                        x[tile.samples].to(flat).repeat_interleave(r, output_size=n * r)
                        for x in coefficients[index]
                    )
                    cores[index] = cores[index] + self._core(c, flat)
                    held_out[index] = held_out[index] + o @ flat.square()
        return [
            _Measured(pairs.eigenvalues, torch.as_tensor(other), torch.as_tensor(core))
            for pairs, other, core in zip(found, held_out, cores, strict=True)
        ]

    def _too_many_rows(self, n_rows: int, n_columns: int) -> str:
        fitting = max_gram_samples(n_columns, self.row_pass, self.options.byte_budget)
        return (
            f"the {n_rows} curvature rows of the drawn samples do not fit byte_budget="
            f"{self.options.byte_budget}. Pass n_samples (at most {fitting} here), a larger "
            "byte_budget, or a rank: that many leading directions are then found without rows."
        )

    # -- walks -----------------------------------------------------------------------------

    def _positioned(self, plan: CurvaturePlan, what: str | None) -> Iterator[tuple[int, Batch]]:
        """Batches with the position of their first sample in the walk."""
        start = 0
        for batch in self._batches(plan, what):
            yield start, batch
            start += len(batch)

    def _batches(self, plan: CurvaturePlan, what: str | None) -> Iterable[Batch]:
        if what is None or not self.progress_bar:
            return plan.batches()
        return tqdm(plan.batches(), total=len(plan), desc=f"[{what}]")


def _per_row(per_sample: Tensor, survey: Survey, like: Tensor) -> Tensor:
    """One value per row [M·R] from one per sample [M]."""
    return per_sample.repeat_interleave(survey.n_columns).to(like)
