"""Choosing prior precision and link on validation data: one pass for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from laplace.utils.enums import LinkApprox, PredType
from torch import Tensor
from tqdm import tqdm

from laplace_debiased.checks import checked_flag, checked_integer, generator_seed
from laplace_debiased.data.loaders import loader_generators
from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods import LikelihoodName
from laplace_debiased.likelihoods.integrals import POINTS
from laplace_debiased.network.inputs import (
    batch_length,
    invoke,
    row_slices,
    select_rows,
    to_device,
)
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import preserved_rng
from laplace_debiased.predictive.call import NETWORKS, checked_link
from laplace_debiased.predictive.predictor import Ask, OutputCovariance
from laplace_debiased.predictive.probabilities import rounded_away, rounding
from laplace_debiased.predictive.selection import NO_LAST_LABEL, last_labels
from laplace_debiased.tuning.grid import PriorGrid
from laplace_debiased.tuning.moments import (
    Loss,
    Moments,
    covariance_curve,
    lowest,
)
from laplace_debiased.tuning.result import TuningResult
from laplace_debiased.tuning.scores import Prediction, Scorer
from laplace_debiased.tuning.validation import Link, Validation

_MAX_STORED_BYTES = 2 * 2**30
"""Moments of the validation set are kept for the refinement up to this size."""

_MAX_PROBABILITY_BYTES = 64 * 2**20
"""Probabilities that are held at a time."""

_COPIES = 6
"""How often moments at all priors are held: parts and whole, scaled by priors, as roots."""

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
class GridSearch:
    """A search over scalar prior precisions and links, refined around the best of them.

    For the linearised network, all grid points and links share one pass over the validation set;
    for sampled networks there is one pass per point, with the same random numbers.

    Attributes:
        validation: data and loss.
        grid: prior precisions to look at.
        pred_type: prediction whose loss is compared.
        link_approx: how probabilities are approximated; None for the better one of "mc" and
            "probit".
        n_samples: points of "mc", sampled networks of "nn"; None for what these take by themselves.
        refine: search on between the neighbours of the best grid point.
        seed: of sampled networks.
    """

    validation: Validation
    grid: PriorGrid
    pred_type: PredType
    link_approx: LinkApprox | str | None = None
    n_samples: int | None = None
    refine: bool = True
    seed: int = 0
    links: tuple[LinkApprox, ...] = field(init=False)

    def __post_init__(self) -> None:
        checked_flag("refine", self.refine)
        # Of two that are equally good the exact one.
        links: tuple[LinkApprox, ...] = LinkApprox.MC, LinkApprox.PROBIT
        if self.link_approx is not None:
            links = (checked_link(self.link_approx, self.validation.subject.likelihood),)
        links = links if self.pred_type is PredType.GLM else (LinkApprox.MC,)
        object.__setattr__(self, "links", links)
        object.__setattr__(self, "seed", generator_seed(self.seed))
        if self.n_samples is not None:
            object.__setattr__(self, "n_samples", checked_integer("n_samples", self.n_samples))

    def run(self, progress_bar: bool = False) -> TuningResult:
        """Search; every random number generator is left as it was.

        Raises:
            ValueError: if the validation set is empty.
            NumericalError: if no grid point has a finite loss.
        """
        generators = loader_generators(self.validation.loader)
        with (
            preserved_rng(generators=generators),
            exact_arithmetic(self.validation.subject.device),
        ):
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

    # -- sampled networks: one pass per grid point ------------------------------------------

    def _sampled(self, progress_bar: bool) -> _Pass:
        """Losses at all prior precisions with the same random numbers, and the MAP model's."""
        validation, subject = self.validation, self.validation.subject
        n_samples, device = self.n_samples or NETWORKS, subject.device

        def sampled(prior: float) -> float:
            generator = torch.Generator(device).manual_seed(self.seed)

            def predict(inputs: Any, targets: Tensor) -> tuple[Prediction, Tensor]:
                found: Any = subject.sampled(prior, inputs, n_samples, generator)
                outputs = found[0] if isinstance(found, tuple) else found
                subject.loss.check_targets(outputs, targets)
                if isinstance(found, tuple):
                    return found, targets
                probabilities, targets, *_ = validation.counted(found, targets)
                return (probabilities,), targets

            return self._loss_of(predict)

        def map_model(inputs: Any, targets: Tensor) -> tuple[Prediction, Tensor]:
            with evaluation_mode(subject.network), torch.no_grad():
                outputs = invoke(subject.network, to_device(inputs, device))
            outputs, targets, *_ = validation.counted(outputs, targets)
            return validation.map_prediction(outputs), targets

        grid = self.grid.bounded()
        points = tqdm(grid.points().tolist(), disable=not progress_bar, desc="[Grid search]")
        losses = [sampled(prior) for prior in points]
        # Sampled rewards have no likelihood to compare.
        compared = validation.loss is None and subject.likelihood != LikelihoodName.REWARD_MODELING
        map_loss = self._loss_of(map_model) if compared else None
        link = None if validation.regression else LinkApprox.MC
        return _Pass(grid, {link: losses}, {}, map_loss, None)

    def _loss_of(self, predict: Callable[[Any, Tensor], tuple[Prediction, Tensor]]) -> float:
        scorer = self.validation.fresh_scorer()
        for inputs, targets in self.validation.batches(progress_bar=False):
            scorer.update(*predict(inputs, targets))
        return self.validation.losses([scorer])[0]

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
        # Once for all batches: it is checked, for which a device is waited for.
        precision = subject.predictor.precision(subject.h, torch.zeros(1))
        scorers, alone = self._scorers(len(on_grid)), self._scorers(len(on_grid))
        map_scorer, rounded = self.validation.fresh_scorer(), torch.zeros(2, len(on_grid)).double()
        for inputs, targets in self._parts(len(priors), progress_bar):
            batch = self._moments(inputs, targets, precision, priors)
            self._score(scorers, batch, batch.covariances[on_grid])
            if not (batch.diagonal or self.validation.regression):
                rounded += rounding(batch.covariances[on_grid])
            if compared:
                prior_only = batch.covariances[-1]
                points = priors[on_grid].reshape(-1, *[1] * prior_only.ndim)
                self._score(alone, batch, prior_only / points)
                map_scorer.update(self.validation.map_prediction(batch.mean), batch.targets)
            if kept is not None:
                kept.append(batch)
                if sum(part.covariances.nbytes for part in kept) > _MAX_STORED_BYTES:
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
        subject = self.validation.subject
        width = min(subject.selection.n_outputs or subject.n_outputs, subject.n_outputs)
        each = (n_nodes + 1) * width * (1 if self._diagonal else width)
        each *= _COPIES * torch.finfo(subject.dtype).bits // 8
        classes = subject.likelihood == LikelihoodName.CLASSIFICATION
        for inputs, targets in self.validation.batches(progress_bar):
            m, positions = batch_length(inputs), 1
            if classes and targets.ndim == 2 and not subject.selection.last_position:
                positions = targets.shape[1]
            step = max(1, subject.byte_budget // max(1, each * positions))
            if step >= m or len(targets) != m:  # what does not fit together is told later
                yield inputs, targets
                continue
            for rows in row_slices(m, step):
                yield select_rows(inputs, rows), targets[rows]

    def _moments(self, inputs: Any, targets: Tensor, precision: Any, priors: Tensor) -> Moments:
        """Moments of what has a label that counts; the positions of sequences as samples."""
        subject = self.validation.subject
        kind = OutputCovariance.DIAGONAL if self._diagonal else OutputCovariance.PER_SAMPLE
        found = subject.predictor.under(Ask(inputs, kind, subject.selection), precision, priors)
        if subject.selection.last_position:
            targets = last_labels(inputs, targets)
        subject.loss.check_targets(found.mean, targets)
        mean, targets, covariances, chosen = self.validation.counted(
            found.mean, targets, found.covariance, found.chosen
        )
        return Moments(mean, covariances, targets, chosen)

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
            at_last = self.validation.subject.selection.last_position
            raise NumericalError(
                f"none of the {len(next(iter(found.losses.values())))} grid points has a finite "
                "validation loss. Check the validation data and the loss for NaN, and whether any "
                "label counts (is not ignore_index); the prior precision is unchanged."
                f"{NO_LAST_LABEL if at_last else ''}"
            )
        loss, link, grid_point, prior = best
        alone = self._optimum(found, found.prior_only, prior_only=True)
        alone_loss, alone_link, _, alone_prior = alone or (None, None, None, None)
        return TuningResult(
            tuple(found.grid.points().tolist()),
            tuple(found.losses[link]),
            grid_point,
            prior,
            loss,
            found.map_loss,
            link and link.value,
            {link.value: tuple(row) for link, row in found.losses.items() if link},
            alone_loss,
            alone_prior,
            alone_link and alone_link.value,
        )

    def _optimum(
        self, found: _Pass, curves: Curves, *, prior_only: bool
    ) -> tuple[float, Link, float, float] | None:
        """The lowest loss of all links, refined, with link, grid point and prior precision.

        Of equals the first link's.
        """
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
                between = self._between(found.grid, found.batches, link, ends, prior_only)
                prior, loss = lowest(between, centre, ends)
            optima.append((loss, link, centre, prior))
        return min(optima, key=lambda optimum: optimum[0], default=None)

    def _between(
        self,
        grid: PriorGrid,
        batches: list[Moments],
        link: Link,
        ends: tuple[float, float],
        prior_only: bool,
    ) -> Loss:
        """Loss between two log prior precisions: covariances are interpolated between nodes."""
        validation, curves = self.validation, []
        if not prior_only:
            nodes = grid.nodes()[0]
            curves = [
                covariance_curve(nodes, batch.covariances[:-1], *ends, diagonal=batch.diagonal)
                for batch in batches
            ]

        def loss(log_prior: float) -> float:
            scorer = validation.fresh_scorer()
            for index, batch in enumerate(batches):
                if prior_only:
                    covariance = batch.covariances[-1] / math.exp(log_prior)
                else:
                    covariance = curves[index](log_prior)
                predicted = validation.predict(
                    batch.mean, covariance, link, self.n_samples, batch.chosen
                )
                scorer.update(predicted, batch.targets)
            return validation.losses([scorer])[0]

        return loss
