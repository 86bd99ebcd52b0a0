"""Moments of a validation set at the nodes of a grid, and losses anywhere between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from laplace_debiased.predictive import CovarianceCurve
from laplace_debiased.tuning.validation import Link, Validation

_RESOLVED = 1e-3
"""Largest rounding error of a covariance, relative to what a softmax sees of it."""

Loss = Callable[[float], float]
"""From a log prior precision to a validation loss."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one validation batch.

    Attributes:
        mean: outputs [m, C].
        covariances: at every node, [K, m, C] or [K, m, C, C].
        prior_only: without curvature at δ = 1, [m, C] or [m, C, C].
        targets: of the samples that count.
        chosen: which outputs the covariances are of, where that is not all.
    """

    mean: Tensor
    covariances: Tensor
    prior_only: Tensor
    targets: Tensor
    chosen: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(self.covariances.nbytes + self.prior_only.nbytes)

    @property
    def diagonal(self) -> bool:
        """Whether covariances are variances."""
        return self.prior_only.ndim == self.mean.ndim


def rounding(covariances: Tensor) -> Tensor:
    """What rounding hides of covariances [K, m, C, C], and what they tell: sums over m [2, K].

    No data say anything about a shift of all outputs: under a very small prior precision its
    variance, which no probability depends on, exceeds the rest by more than the dtype resolves.
    """
    diagonals = covariances.diagonal(dim1=-2, dim2=-1)
    rest = (diagonals.mean(-1) - covariances.mean((-2, -1))).sum(-1)
    resolution = torch.finfo(covariances.dtype).eps * diagonals.amax(-1).sum(-1)
    return torch.stack([resolution, rest]).double().cpu()


def rounded_away(sums: Tensor) -> Tensor:
    """At which nodes [K] rounding hides what classes do not share, from :func:`rounding`."""
    return sums[0] > _RESOLVED * sums[1]


def curved_loss(
    validation: Validation,
    batches: Sequence[Moments],
    log_nodes: Tensor,
    ends: tuple[float, float],
    link: Link,
    n_points: int | None,
) -> Loss:
    """Loss between two log prior precisions, from covariances interpolated between nodes."""
    curves = [
        CovarianceCurve.fit(log_nodes, batch.covariances, *ends, diagonal=batch.diagonal)
        for batch in batches
    ]
    return _loss(validation, batches, link, n_points, lambda k, log_prior: curves[k](log_prior))


def prior_only_loss(
    validation: Validation, batches: Sequence[Moments], link: Link, n_points: int | None
) -> Loss:
    """Loss without curvature at any log prior precision."""
    return _loss(
        validation,
        batches,
        link,
        n_points,
        lambda k, log_prior: batches[k].prior_only / math.exp(log_prior),
    )


def _loss(
    validation: Validation,
    batches: Sequence[Moments],
    link: Link,
    n_points: int | None,
    covariance: Callable[[int, float], Tensor],
) -> Loss:
    def loss(log_prior: float) -> float:
        scorer = validation.fresh_scorer()
        for index, batch in enumerate(batches):
            at = covariance(index, log_prior)
            found = validation.predict(batch.mean, at, link, n_points, batch.chosen)
            scorer.update(found, batch.targets)
        return validation.losses([scorer])[0]

    return loss


def lowest(loss: Loss, centre: float, ends: tuple[float, float]) -> tuple[float, float]:
    """The best prior precision between two logarithms, and its loss; ``centre`` if none is better.

    Args:
        loss: validation loss.
        centre: prior precision to beat.
        ends: log prior precisions around it.
    """
    at_centre = loss(math.log(centre))
    options = {"xatol": 1e-2, "maxiter": 25}
    found = minimize_scalar(loss, bounds=ends, method="bounded", options=options)
    for near in (_vertex(loss, float(found.x), ends), float(found.x)):
        place = _GRAIN * round(near / _GRAIN)
        value = loss(place)
        if value < at_centre:
            return math.exp(place), value
    return centre, at_centre


_GRAIN = 1e-3
"""What a logarithm of a prior precision is a multiple of.

No validation set knows it better than to a few per cent. What lies below is the rounding of sums,
which depends on their order; without it, the same data give the same prior on any number of
processes.
"""

_STEP = 0.05
"""Between the points of a parabola, in the logarithm of the prior precision."""


def _vertex(loss: Loss, near: float, ends: tuple[float, float]) -> float:
    """Lowest point of the parabola through three points of a fixed lattice; ``near`` at an end.

    A search that compares losses ends somewhere within the root of their rounding errors, which
    depend on the order of sums, and so on how many processes form them. Differences of losses at
    fixed points do not: the vertex is known to about a rounding error over the curvature.
    """
    middle = round(near / _STEP) * _STEP
    if not (ends[0] <= middle - _STEP and middle + _STEP <= ends[1]):
        return near
    left, at, right = (loss(middle + step) for step in (-_STEP, 0.0, _STEP))
    curvature = left - 2.0 * at + right
    if not curvature > 1e-9 * abs(at):
        return middle  # flat within what rounding leaves
    return middle + _STEP * max(-1.0, min(1.0, 0.5 * (left - right) / curvature))
