"""Choosing prior precision and link on validation data: one pass for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from laplace.utils.enums import LinkApprox, PredType
from torch import Tensor

from laplace_debiased.checks import checked_integer, generator_seed
from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods.points import POINTS
from laplace_debiased.network.inputs import batch_length, row_slices, select_rows
from laplace_debiased.predictive.call import NETWORKS
from laplace_debiased.predictive.selection import last_labels
from laplace_debiased.tuning.grid import PriorGrid
from laplace_debiased.tuning.moments import (
    Loss,
    Moments,
    curved_loss,
    lowest,
    prior_only_loss,
    rounded_away,
    rounding,
)
from laplace_debiased.tuning.result import TuningResult
from laplace_debiased.tuning.sampled import network_map_loss, sampled_losses
from laplace_debiased.tuning.scores import Scorer
from laplace_debiased.tuning.validation import Link, Validation

_MAX_STORED_BYTES = 2 * 2**30
"""Moments of the validation set are kept for the refinement up to this size."""

_MAX_PROBABILITY_BYTES = 64 * 2**20
"""Probabilities that are held at a time."""

_MAX_PASSES = 4
"""Walks over the validation set, where the optimum lies ever further beyond the grid."""

Curves = dict[Link, list[float]]
"""Losses at every grid point, by link."""


@dataclass(frozen=True, eq=False)
class _Pass:
    """What one walk over the validation set gives.

    Attributes:
        grid: prior precisions.
        losses: of the posterior.
        prior_only: without curvature; empty with a loss of the user's own.
        map_loss: of the MAP model; None with a loss of the user's own.
        batches: moments; None where they are too large to keep.
    """

    grid: PriorGrid
    losses: Curves
    prior_only: Curves
    map_loss: float | None
    batches: list[Moments] | None

    def wider(self) -> PriorGrid | None:
        """A grid that reaches further, if some loss asks for it."""
        for losses in (*self.losses.values(), *self.prior_only.values()):
            wider = self.grid.wider(losses)
            if wider is not None:
                return wider
        return None


@dataclass(frozen=True, eq=False)
class _Optimum:
    """The lowest loss under one link."""

    link: Link
    grid_point: float
    prior_precision: float
    loss: float


@dataclass(frozen=True, eq=False)
class GridSearch:
    """A search over scalar prior precisions and links, refined around the best of them.

    For the linearised network, all grid points and links share one pass over the validation set;
    for sampled networks there is one pass per point, with the same random numbers.

    Attributes:
        validation: data and loss.
        grid: prior precisions to look at.
        pred_type: prediction whose loss is compared.
        links: ways to approximate probabilities, the preferred one first.
        n_samples: points of "mc", sampled networks of "nn"; None for what these take by themselves.
        refine: search on between the neighbours of the best grid point.
        seed: of sampled networks.
    """

    validation: Validation
    grid: PriorGrid
    pred_type: PredType
    links: tuple[LinkApprox, ...]
    n_samples: int | None
    refine: bool
    seed: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", generator_seed(self.seed))
        if self.n_samples is not None:
            object.__setattr__(self, "n_samples", checked_integer("n_samples", self.n_samples))

    def run(self, progress_bar: bool = False) -> TuningResult:
        """Search.

        Raises:
            ValueError: if the validation set is empty.
            NumericalError: if no grid point has a finite loss.
        """
        if self.pred_type is PredType.NN:
            return self._result(self._sampled(progress_bar))
        grid = self.grid
        for _ in range(_MAX_PASSES):
            found = self._walk(grid, progress_bar)
            wider = found.wider()
            if wider is None:
                break
            grid = wider
        return self._result(found)

    def _sampled(self, progress_bar: bool) -> _Pass:
        grid, n_samples = self.grid.bounded(), self.n_samples or NETWORKS
        points = grid.points().tolist()
        losses = sampled_losses(self.validation, points, n_samples, self.seed, progress_bar)
        link = None if self.validation.regression else LinkApprox.MC
        return _Pass(grid, {link: losses}, {}, network_map_loss(self.validation), None)

    # -- one pass for the linearised network -----------------------------------------------

    @property
    def _tried(self) -> tuple[Link, ...]:
        return (None,) if self.validation.regression else self.links

    def _walk(self, grid: PriorGrid, progress_bar: bool) -> _Pass:
        """Score every grid point under every link, with curvature and without, and the MAP."""
        log_nodes, on_grid = grid.nodes()
        kept: list[Moments] | None = [] if self.refine and len(on_grid) > 1 else None
        if kept is None:
            log_nodes, on_grid = log_nodes[on_grid], torch.arange(len(on_grid))
        subject, compared = self.validation.subject, self.validation.loss is None
        priors = log_nodes.exp().to(subject.device, subject.dtype)
        scorers, alone = self._scorers(len(on_grid)), self._scorers(len(on_grid))
        map_scorer, rounded = self.validation.fresh_scorer(), torch.zeros(2, len(on_grid)).double()
        for inputs, targets in self._parts(len(priors), progress_bar):
            batch = self._moments(inputs, targets, priors)
            self._score(scorers, batch, batch.covariances[on_grid])
            if not (batch.diagonal or self.validation.regression):
                rounded += rounding(batch.covariances[on_grid])
            if compared:
                points = priors[on_grid].reshape(-1, *[1] * batch.prior_only.ndim)
                self._score(alone, batch, batch.prior_only / points)
                map_scorer.update(self.validation.map_prediction(batch.mean), batch.targets)
            if kept is not None:
                kept.append(batch)
                if sum(part.nbytes for part in kept) > _MAX_STORED_BYTES:
                    kept = None
        everyones = self.validation.block.everyones("moments", (rounded, kept is not None))
        hidden = rounded_away(torch.stack([theirs for theirs, _ in everyones]).sum(0))
        if not all(keeps for _, keeps in everyones):
            kept = None
        losses = {
            link: [
                math.inf if lost and self.validation.reads_covariance(link) else loss
                for loss, lost in zip(row, hidden.tolist(), strict=True)
            ]
            for link, row in self._values(scorers).items()
        }
        if not compared:
            return _Pass(grid, losses, {}, None, kept)
        [map_loss] = self.validation.losses([map_scorer])
        return _Pass(grid, losses, self._values(alone), map_loss, kept)

    def _values(self, scorers: dict[Link, list[Scorer]]) -> Curves:
        values = iter(self.validation.losses([one for row in scorers.values() for one in row]))
        return {link: [next(values) for _ in row] for link, row in scorers.items()}

    def _scorers(self, n_points: int) -> dict[Link, list[Scorer]]:
        return {
            link: [self.validation.fresh_scorer() for _ in range(n_points)] for link in self._tried
        }

    @property
    def _diagonal(self) -> bool:
        """Whether no link reads more than variances."""
        return not any(map(self.validation.reads_covariance, self._tried))

    def _parts(self, n_nodes: int, progress_bar: bool) -> Iterator[tuple[Any, Tensor]]:
        """Validation batches, in parts whose moments at all nodes fit the byte budget."""
        for inputs, targets in self.validation.batches(progress_bar):
            subject, m = self.validation.subject, batch_length(inputs)
            step = subject.samples_at_a_time(n_nodes, targets, diagonal=self._diagonal)
            if step >= m or len(targets) != m:  # what does not fit together is told later
                yield inputs, targets
                continue
            for rows in row_slices(m, step):
                yield select_rows(inputs, rows), targets[rows]

    def _moments(self, inputs: Any, targets: Tensor, priors: Tensor) -> Moments:
        """Moments of what has a label that counts; the positions of sequences as samples."""
        subject = self.validation.subject
        swept = subject.predictor.sweep(
            inputs, subject.h, priors, subject.selection, diagonal=self._diagonal
        )
        if subject.selection.last_position:
            targets = last_labels(inputs, targets)
        subject.loss.check_targets(swept.outputs, targets)
        together = torch.cat([swept.covariances, swept.prior_only.unsqueeze(0)])
        mean, together, targets, chosen = self.validation.counted(
            swept.outputs, together, targets, swept.chosen
        )
        return Moments(mean, together[:-1], together[-1], targets, chosen)

    def _score(
        self, scorers: dict[Link, list[Scorer]], batch: Moments, covariances: Tensor
    ) -> None:
        """Add a batch with its covariances at every grid point [G, m, ...].

        As many grid points at a time as their probabilities of all classes stay small.
        """
        step = max(1, _MAX_PROBABILITY_BYTES // max(1, batch.mean.nbytes))
        # As many points at every prior: at the hopeless ones the many that are accurate would
        # take longer than all the rest.
        n_points = self.n_samples or POINTS
        for start in range(0, len(covariances), step):
            some = covariances[start : start + step]
            mean = batch.mean.expand(len(some), *batch.mean.shape)
            chosen = None if batch.chosen is None else batch.chosen.expand(len(some), -1, -1)
            for link, row in scorers.items():
                prediction = self.validation.predict(mean, some, link, n_points, chosen)
                for scorer, *parts in zip(row[start : start + step], *prediction, strict=True):
                    scorer.update(tuple(parts), batch.targets)

    # -- the choice ------------------------------------------------------------------------

    def _result(self, found: _Pass) -> TuningResult:
        best = self._optimum(found, found.losses, prior_only=False)
        if best is None:
            raise NumericalError(
                f"none of the {len(next(iter(found.losses.values())))} grid points has a finite "
                "validation loss. Check the validation data and the loss for NaN; the prior "
                "precision is unchanged."
            )
        alone = self._optimum(found, found.prior_only, prior_only=True)
        return TuningResult(
            tuple(found.grid.points().tolist()),
            tuple(found.losses[best.link]),
            best.grid_point,
            best.prior_precision,
            best.loss,
            found.map_loss,
            _name(best.link),
            {str(_name(link)): tuple(row) for link, row in found.losses.items() if link},
            None if alone is None else alone.loss,
            None if alone is None else alone.prior_precision,
            None if alone is None else _name(alone.link),
        )

    def _optimum(self, found: _Pass, curves: Curves, *, prior_only: bool) -> _Optimum | None:
        """The lowest loss of all links, refined; the first link of equals."""
        points, optima = found.grid.points(), []
        for link, losses in curves.items():
            index = found.grid.best(losses)
            if index is None:
                continue
            centre, loss = float(points[index]), losses[index]
            prior = centre
            if found.batches is not None and len(points) > 1:
                around = points[max(0, index - 1)], points[min(len(points) - 1, index + 1)]
                ends = float(around[0].log()), float(around[1].log())
                between = self._between(found, found.batches, link, ends, prior_only)
                prior, loss = lowest(between, centre, ends)
            optima.append(_Optimum(link, centre, prior, loss))
        return min(optima, key=lambda optimum: optimum.loss, default=None)

    def _between(
        self,
        found: _Pass,
        batches: list[Moments],
        link: Link,
        ends: tuple[float, float],
        prior_only: bool,
    ) -> Loss:
        if prior_only:
            return prior_only_loss(self.validation, batches, link, self.n_samples)
        log_nodes, _ = found.grid.nodes()
        return curved_loss(self.validation, batches, log_nodes, ends, link, self.n_samples)


def _name(link: Link) -> str | None:
    return None if link is None else link.value
