"""Low-rank curvature of a plan: directions, magnitudes along them, and the schemes' averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.lowrank.over_ranks import (
    gram_over_ranks,
    pairs_of_first,
    pairs_over_ranks,
)
from laplace_debiased.curvature.lowrank.products import lanczos_eigenpairs
from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.curvature.lowrank.span import (
    Eigenpairs,
    SpanDirections,
    matrix_average,
    relative_cutoff,
    span_eigenpairs,
)
from laplace_debiased.data.coefficients import draw_coefficients
from laplace_debiased.data.sources import Batch, Draws
from laplace_debiased.debiasing.bias import Comparison, compared
from laplace_debiased.debiasing.schemes import Measurement, scheme_plan
from laplace_debiased.estimation.structure import Task
from laplace_debiased.estimation.tally import Tally
from laplace_debiased.estimation.walking import coefficients_of, fit_columns, rows_of
from laplace_debiased.network.inputs import select_rows
from laplace_debiased.parallel.sums import summed

ROW_BUDGETS = 4
"""The rows of the Gram route may take so many times the byte budget of a pass. They are as large as
the posterior's own basis when every direction is kept."""

MAX_GRAM_ROWS = 4096
"""The eigendecomposition of a Gram matrix of this size takes about half a minute on two cores."""


def max_gram_rows(row_pass: RowPass, byte_budget: int) -> int:
    """How many rows are held in memory at most, with their Gram matrix."""
    network = row_pass.network
    row_bytes = network.n_params * torch.finfo(network.dtype).bits // 8
    return min(MAX_GRAM_ROWS, ROW_BUDGETS * byte_budget // row_bytes)


@dataclass(frozen=True, eq=False)
class Survey:
    """One forward pass over a plan: all that columns and coefficients are made of.

    Attributes:
        task: what the fit works on.
        outputs: f [M, C] of this rank's samples, in the order of their walk.
        samples: these, without inputs.
        draws: folds, counts and weights of the samples of all ranks, one rank after the other.
        tally: the loss, and more, of all ranks.
        n_columns: R.
        sketch: number of columns that stand for the loss Hessian's root; None for all of it.
    """

    task: Task
    outputs: Tensor
    samples: Batch
    draws: Draws
    tally: Tally
    n_columns: int
    sketch: int | None = None

    def columns(self, index: Tensor | slice) -> Tensor:
        """Columns S [n, C, R] of some of this rank's samples."""
        return fit_columns(self.task, self.samples.select(index), self.outputs[index], self.sketch)


@dataclass(frozen=True, eq=False)
class LowRankEstimator:
    """Estimates low-rank curvature, of at most ``rank`` directions; None for all that count."""

    row_pass: RowPass
    task: Task
    rank: int | None

    def estimate(self, survey: Survey) -> tuple[Eigenpairs, list[Comparison]]:
        """Eigenpairs of the joined folds, and how own and held-out samples see each set on the way.

        Raises:
            ValueError: if the rows do not fit in memory and no ``rank`` is given.
            NumericalError: if the curvature is not finite, or vanishes.
        """
        n_rows = len(survey.draws) * survey.n_columns
        # The budget may follow from what memory is free, which differs from rank to rank.
        most = max_gram_rows(self.row_pass, self.task.options.byte_budget)
        if n_rows <= self.task.ranks.from_first("the way to the eigenpairs", lambda: [most])[0]:
            return self._by_gram_matrix(survey)
        if self.rank is None:
            raise ValueError(
                f"the {n_rows} curvature rows of the drawn samples do not fit byte_budget="
                f"{self.task.options.byte_budget}. Pass n_samples (at most "
                f"{most // survey.n_columns} here), a larger byte_budget, or a rank: that many "
                "leading directions are then found without rows."
            )
        return self._by_products(survey, self.rank)

    def survey(self) -> Survey:
        """The first walk: outputs, targets and draws."""
        task, network, tally = self.task, self.row_pass.network, Tally()
        outputs: list[Tensor] = []
        parts: list[Batch] = []
        for _, batch in self._positioned("outputs"):
            outputs.append(self.row_pass.outputs(batch.inputs))
            parts.append(rows_of(batch, slice(None), outputs[-1].device))
            task.loss.check_targets(outputs[-1], parts[-1].targets)
            tally.add(task.loss, outputs[-1], parts[-1])
        tally = tally.over_ranks(task.ranks)
        tally.require_usable(task.loss)
        none = torch.empty((0, tally.n_outputs), dtype=network.dtype, device=network.device)
        nowhere = torch.empty(0, dtype=torch.int64)
        own = Draws.joined([replace(Draws.uniform(nowhere), positions=nowhere), *parts])
        targets = torch.cat([part.targets for part in parts]) if parts else none[:, 0]
        survey = Survey(
            task,
            torch.cat(outputs) if outputs else none,
            Batch(**vars(own), inputs=None, targets=targets),
            Draws.joined(task.ranks.gathered("draws", own)),
            tally,
            0,
            task.options.sketched(outputs[-1][0].numel()) if outputs else None,
        )
        n_columns = survey.columns(slice(0, 1)).shape[-1] if outputs else 0
        return replace(survey, n_columns=max(task.ranks.gathered("columns", n_columns)))

    # -- all rows in memory ----------------------------------------------------------------

    def _by_gram_matrix(self, survey: Survey) -> tuple[Eigenpairs, list[Comparison]]:
        """Everything from one Gram matrix of all rows; only the final basis is formed."""
        ranks, rows = self.task.ranks, self._rows(survey)
        gram = gram_over_ranks(ranks, rows)
        found = ranks.from_first(
            "directions", lambda: self._from_gram(gram, survey, relative_cutoff(rows.dtype))
        )
        coefficients, eigenvalues, comparisons = found
        pairs = pairs_over_ranks(ranks, rows, SpanDirections(coefficients, eigenvalues))
        return pairs, comparisons

    def _from_gram(
        self, gram: Tensor, survey: Survey, cutoff: float
    ) -> tuple[Tensor, Tensor, list[Comparison]]:
        """Coefficients and eigenvalues of the directions of all together, and the comparisons."""
        plan = self.task.plan
        comparisons, factors = [], []
        for step in scheme_plan(self.task.options.scheme, plan.fold_sizes).measurements:
            own = draw_coefficients(plan, survey.draws, step.direction_folds)
            root = _per_row(own.sqrt(), survey, gram)
            found = span_eigenpairs(gram, root, rank=self.rank, cutoff=cutoff)
            squares = (gram @ found.coefficients).square()
            held_out = draw_coefficients(plan, survey.draws, step.magnitude_folds)
            both = (held_out, coefficients_of(plan, step, survey.draws))
            held, magnitudes = (_per_row(one, survey, gram) @ squares for one in both)
            comparisons.append(compared([found.eigenvalues], [held]))
            scales = (magnitudes.double() * step.share).clamp_min(0.0).sqrt()
            factors.append(found.coefficients * scales)
        joined = span_eigenpairs(gram, torch.cat(factors, 1), rank=self.rank, cutoff=cutoff)
        return joined.coefficients, joined.eigenvalues, comparisons

    def _rows(self, survey: Survey) -> Tensor:
        """This rank's rows [M·R, P], R of them per sample."""
        network = self.row_pass.network
        shape = (len(survey.outputs), survey.n_columns, network.n_params)
        rows = torch.empty(shape, dtype=network.dtype, device=network.device)
        for start, batch in self._positioned("rows"):
            columns = survey.columns(slice(start, start + len(batch)))
            for tile, values in self.row_pass.walk(batch.inputs, columns):
                rows[start : start + len(batch)][tile.samples, tile.columns] = values
        return rows.flatten(0, 1)

    # -- no rows in memory -----------------------------------------------------------------

    def _by_products(self, survey: Survey, rank: int) -> tuple[Eigenpairs, list[Comparison]]:
        """Lanczos on GGN-vector products per set of directions, then one walk to measure them."""
        steps = scheme_plan(self.task.options.scheme, self.task.plan.fold_sizes).measurements
        with self.task.clock.stage("products"):
            found = [self._leading(survey, step, rank) for step in steps]
        measured = self._measure_products(survey, steps, found)
        parts = [
            Eigenpairs(pairs.basis, magnitudes)
            for pairs, (_, magnitudes) in zip(found, measured, strict=True)
        ]
        comparisons = [
            compared([pairs.eigenvalues], [held])
            for pairs, (held, _) in zip(found, measured, strict=True)
        ]
        shares = [step.share for step in steps]
        average = pairs_of_first(self.task.ranks, lambda: matrix_average(parts, shares, rank))
        return average, comparisons

    def _leading(self, survey: Survey, step: Measurement, rank: int) -> Eigenpairs:
        weights = survey.outputs.new_zeros(len(survey.outputs))

        def walk() -> Iterator[tuple[Any, Tensor]]:
            for start, batch in self._positioned(None):
                own = draw_coefficients(self.task.plan, batch, step.direction_folds)
                used = own.nonzero().squeeze(-1)
                if len(used):
                    weights[start : start + len(batch)] = own.to(weights)
                    yield select_rows(batch.inputs, used), start + used

        def columns_at(positions: Tensor) -> Tensor:
            return survey.columns(positions) * weights[positions].sqrt().reshape(-1, 1, 1)

        return lanczos_eigenpairs(
            self.row_pass.network,
            walk,
            columns_at,
            rank,
            seed=self.task.request.seed,
            progress_bar=self.task.request.progress_bar,
            ranks=self.task.ranks,
        )

    def _measure_products(
        self, survey: Survey, steps: Sequence[Measurement], found: Sequence[Eigenpairs]
    ) -> list[tuple[Tensor, Tensor]]:
        """Directional curvatures [k] in one walk over the rows.

        For each set their mean over the held-out draws, and the unbiased combination that the
        posterior takes.
        """
        plan = self.task.plan
        sums = [[torch.zeros_like(pairs.eigenvalues) for _ in range(2)] for pairs in found]
        for start, batch in self._positioned("magnitudes"):
            columns = survey.columns(slice(start, start + len(batch)))
            wanted = [
                (
                    draw_coefficients(plan, batch, step.magnitude_folds),
                    coefficients_of(plan, step, batch),
                )
                for step in steps
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
        flat = summed(self.task.ranks, "directional curvature", [t for both in sums for t in both])
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _positioned(self, what: str | None) -> Iterator[tuple[int, Batch]]:
        """Batches of what this rank walks, with the position of their first sample in the walk."""
        share, start = self.task.plan.share(self.task.ranks), 0
        for batch in share.batches() if what is None else self.task.clock.walk(share, what):
            yield start, batch
            start += len(batch)


def _per_row(per_sample: Tensor, survey: Survey, like: Tensor) -> Tensor:
    """One value per row [M·R] from one per sample [M]."""
    return per_sample.repeat_interleave(survey.n_columns).to(like)
