"""Choosing the prior precision on validation data: one pass for a whole grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torchmetrics
from laplace.utils.enums import LinkApprox, PredType
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from laplace_debiased.checks import checked_integer, generator_seed
from laplace_debiased.data import split_batch
from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods import LikelihoodName
from laplace_debiased.network.inputs import invoke, to_device
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.predictive.interpolation import CovarianceCurve
from laplace_debiased.predictive.probabilities import class_probabilities, needs_covariance
from laplace_debiased.tuning.result import TuningResult
from laplace_debiased.tuning.scores import Prediction, Scorer, scorer_factory
from laplace_debiased.tuning.subject import Subject

_MAX_NODE_SPACING = 0.25 * math.log(10.0)
"""Refinement interpolates between nodes at most this far apart in log prior precision."""

_LABELS = (LikelihoodName.CLASSIFICATION, LikelihoodName.BERNOULLI)

_MAX_STORED_BYTES = 2 * 2**30
"""Moments of the validation set are kept for the refinement up to this size."""


@dataclass(frozen=True)
class PriorGrid:
    """A logarithmic grid of prior precisions, ``base`` raised to ``size`` exponents.

    Raises:
        ValueError: if it is empty or its ends are out of order.
    """

    log_min: float
    log_max: float
    size: int
    base: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checked_integer("grid_size", self.size))
        if not (math.isfinite(self.log_min) and math.isfinite(self.log_max)):
            raise ValueError("log_prior_prec_min and log_prior_prec_max must be finite.")
        if self.log_min > self.log_max or (self.log_min == self.log_max and self.size > 1):
            raise ValueError(
                f"log_prior_prec_min={self.log_min} must lie below "
                f"log_prior_prec_max={self.log_max}."
            )
        if not (math.isfinite(self.base) and self.base > 1):
            raise ValueError(f"log_prior_prec_base must be larger than 1; got {self.base!r}.")

    def points(self) -> Tensor:
        """Grid points δ [size], ascending, float64."""
        return torch.logspace(
            self.log_min, self.log_max, self.size, base=self.base, dtype=torch.float64
        )

    def nodes(self) -> tuple[Tensor, Tensor]:
        """Log prior precisions to evaluate, and which of them are grid points.

        Between grid points that lie far apart further nodes are added, so that interpolation
        between neighbours is accurate.
        """
        points = self.points().log()
        if len(points) == 1:
            return points, torch.tensor([0])
        gap = float(points[1] - points[0])
        pieces = max(1, math.ceil(gap / _MAX_NODE_SPACING))
        steps = torch.arange(pieces, dtype=torch.float64) / pieces
        inner = (points[:-1, None] + gap * steps).flatten()
        return torch.cat([inner, points[-1:]]), torch.arange(len(points)) * pieces


@dataclass(frozen=True, eq=False)
class _StoredBatch:
    """Moments of one validation batch at every node."""

    mean: Tensor
    covariances: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False)
class GridSearch:
    """A grid search over scalar prior precisions with a refinement around the best point.

    For the linearised network, all grid points share one pass over the validation set; for
    sampled networks there is one pass per point, with the same random numbers.
    """

    subject: Subject
    grid: PriorGrid
    pred_type: PredType
    link: LinkApprox
    n_samples: int
    loss: torchmetrics.Metric | Callable[..., Tensor | float] | None
    refine: bool
    seed: int
    _fresh_scorer: Callable[[], Scorer] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", generator_seed(self.seed))
        object.__setattr__(self, "n_samples", checked_integer("n_samples", self.n_samples))
        noise = self.subject.noise_variance
        factory = scorer_factory(self.loss, self.subject.likelihood, noise_variance=noise)
        object.__setattr__(self, "_fresh_scorer", factory)

    @property
    def _regression(self) -> bool:
        return self.subject.likelihood == LikelihoodName.REGRESSION

    @property
    def _diagonal(self) -> bool:
        """Whether variances are enough for the predictions that are compared."""
        if self._regression:
            return self.loss is None
        return not needs_covariance(self.link, diagonal_output=False)

    def run(self, val_loader: DataLoader, progress_bar: bool = False) -> TuningResult:
        """Search.

        Raises:
            ValueError: if the loader is empty.
            NumericalError: if no grid point has a finite loss.
        """
        if self.pred_type is PredType.NN:
            points = self.grid.points()
            losses = [
                self._sampled_loss(float(prior), val_loader)
                for prior in tqdm(points, disable=not progress_bar, desc="[Grid search]")
            ]
            return self._result(points, losses, None, self._network_map_loss(val_loader))
        return self._linearised_search(val_loader, progress_bar)

    def _linearised_search(self, val_loader: DataLoader, progress_bar: bool) -> TuningResult:
        log_nodes, on_grid = self.grid.nodes()
        scorers, map_scorer = [self._fresh_scorer() for _ in on_grid], self._fresh_scorer()
        stored: list[_StoredBatch] | None = [] if self.refine and len(on_grid) > 1 else None
        priors = log_nodes.exp().to(self.subject.device, self.subject.dtype)
        if stored is None:
            priors, on_grid = priors[on_grid], torch.arange(len(on_grid))
        for index, (inputs, targets) in enumerate(self._batches(val_loader, progress_bar)):
            swept = self.subject.predictor.sweep(
                inputs, self.subject.h, priors, diagonal=self._diagonal
            )
            mean, covariances = swept.outputs, swept.covariances
            self.subject.loss.check_targets(mean, targets)
            mean, covariances, targets = self._scored(mean, covariances, targets)
            for scorer, node in zip(scorers, on_grid.tolist(), strict=True):
                scorer.update(self._predict(mean, covariances[node], index), targets)
            if self.loss is None:
                map_scorer.update(self._map_prediction(mean), targets)
            if stored is not None:
                stored.append(_StoredBatch(mean, covariances, targets))
                if sum(batch.covariances.nbytes for batch in stored) > _MAX_STORED_BYTES:
                    stored = None
        losses = [scorer.value() for scorer in scorers]
        refined = None if stored is None else _Refinement(self, log_nodes, stored)
        map_loss = map_scorer.value() if self.loss is None else None
        return self._result(self.grid.points(), losses, refined, map_loss)

    def _batches(self, loader: DataLoader, progress_bar: bool) -> Iterator[tuple[Any, Tensor]]:
        device, empty = self.subject.device, True
        for batch in tqdm(loader, disable=not progress_bar, desc="[Validation set]"):
            empty = False
            inputs, targets = split_batch(batch, self.subject.label_key)
            yield inputs, targets.to(device)
        if empty:
            raise ValueError("val_loader is empty.")

    def _scored(
        self, mean: Tensor, covariances: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Only what has a label that counts; the positions of sequences as samples.

        Class indices come out in int64, which lookups need and a user's loss may rely on.
        """
        n_lead = targets.ndim if mean.ndim == 3 else 1
        mask = self.subject.loss.label_mask(targets)
        if self.subject.likelihood == LikelihoodName.CLASSIFICATION and not (
            targets.is_floating_point() or targets.is_complex()
        ):
            targets = targets.long()
        if n_lead == 2:
            mean, covariances = mean.flatten(0, 1), covariances.flatten(1, 2)
            targets, mask = targets.flatten(), None if mask is None else mask.flatten()
        if mask is None:
            return mean, covariances, targets
        return mean[mask], covariances[:, mask], targets[mask]

    def _predict(self, mean: Tensor, covariance: Tensor, batch: int) -> Prediction:
        if self._regression:
            return mean, covariance
        generator = torch.Generator(mean.device).manual_seed((self.seed + batch) % 2**64)
        inverse = self.subject.inverse_link
        return (
            class_probabilities(mean, covariance, self.link, self.n_samples, generator, inverse),
        )

    def _map_prediction(self, outputs: Tensor) -> Prediction:
        """What the MAP model predicts by its outputs alone: no epistemic variance."""
        if self._regression:
            return outputs, torch.zeros_like(outputs)
        return (self.subject.inverse_link(outputs.double()),)

    def _network_map_loss(self, loader: DataLoader) -> float | None:
        """The MAP model's loss, by a walk of its own: sampled networks do not pass its outputs."""
        model, comparable = self.subject.network, (*_LABELS, LikelihoodName.REGRESSION)
        if self.loss is not None or self.subject.likelihood not in comparable:
            return None
        scorer = self._fresh_scorer()
        with evaluation_mode(model), torch.no_grad():
            for inputs, targets in self._batches(loader, progress_bar=False):
                outputs = invoke(model, to_device(inputs, self.subject.device))
                outputs, _, targets = self._scored(outputs, outputs.unsqueeze(0), targets)
                scorer.update(self._map_prediction(outputs), targets)
        return scorer.value()

    def _sampled_loss(self, prior: float, loader: DataLoader) -> float:
        """Validation loss of sampled networks at one prior precision."""
        scorer = self._fresh_scorer()
        generator = torch.Generator(self.subject.device).manual_seed(self.seed)
        for inputs, targets in self._batches(loader, progress_bar=False):
            prediction = self.subject.sampled(prior, inputs, self.n_samples, generator)
            if isinstance(prediction, tuple):
                scorer.update(prediction, targets)
            else:
                probs, _, targets = self._scored(prediction, prediction.unsqueeze(0), targets)
                scorer.update((probs,), targets)
        return scorer.value()

    def _result(
        self,
        points: Tensor,
        losses: list[float],
        refinement: _Refinement | None,
        map_loss: float | None,
    ) -> TuningResult:
        finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
        if not finite:
            raise NumericalError(
                f"none of the {len(losses)} grid points has a finite validation loss. Check the "
                "validation data and the loss for NaN; the prior precision is unchanged."
            )
        best = min(finite, key=lambda index: losses[index])
        prior, loss = float(points[best]), losses[best]
        if refinement is not None:
            log_points = points.log()
            low, high = max(best - 1, 0), min(best + 1, len(points) - 1)
            found = refinement.minimise(float(log_points[low]), float(log_points[high]))
            if math.isfinite(found[1]) and found[1] < loss:
                prior, loss = found
        grid = tuple(points.tolist())
        return TuningResult(grid, tuple(losses), float(points[best]), prior, loss, map_loss)


@dataclass(frozen=True, eq=False)
class _Refinement:
    """Validation loss between grid points, from moments interpolated in log prior precision."""

    search: GridSearch
    log_nodes: Tensor
    batches: list[_StoredBatch]

    def minimise(self, low: float, high: float) -> tuple[float, float]:
        """The best prior precision between two logarithms, and its loss."""
        curves = [
            CovarianceCurve.fit(
                self.log_nodes, batch.covariances, low, high, diagonal=self.search._diagonal
            )
            for batch in self.batches
        ]

        def loss(log_prior: float) -> float:
            scorer = self.search._fresh_scorer()
            for index, (batch, curve) in enumerate(zip(self.batches, curves, strict=True)):
                prediction = self.search._predict(batch.mean, curve(log_prior), index)
                scorer.update(prediction, batch.targets)
            return scorer.value()

        found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
        return math.exp(found.x), float(found.fun)
