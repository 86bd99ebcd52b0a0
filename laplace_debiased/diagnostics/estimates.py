r"""Means over samples of several correlated quantities, with the covariance of those means.

The curvatures along two directions are measured on the same samples, so their errors are
correlated. Keeping the whole covariance gives any average over directions its right error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MeanEstimate:
    """Per-sample means of k quantities.

    Attributes:
        mean: sample means [k], float64.
        covariance: covariance [k, k] of these means as estimates of the expectation over data:
            the samples' covariance divided by their number (NaN for a single sample).
        n_samples: number of samples behind the means.
    """

    mean: Tensor
    covariance: Tensor
    n_samples: int

    @property
    def stderr(self) -> Tensor:
        """Standard errors of the means [k]."""
        return self.covariance.diagonal().clamp_min(0.0).sqrt()

    def combine(self, weights: Tensor) -> MeanEstimate:
        """Means [g] of linear combinations of the quantities, with coefficients [k, g]."""
        weights = weights.to(self.mean)
        return MeanEstimate(
            weights.T @ self.mean, weights.T @ self.covariance @ weights, self.n_samples
        )

    def shifted(self, offset: Tensor) -> MeanEstimate:
        """The means plus constants [k]; their covariance does not change."""
        return MeanEstimate(self.mean + offset.to(self.mean), self.covariance, self.n_samples)


@dataclass(frozen=True, eq=False)
class MomentSums:
    """Running first and second moments: merged batch by batch, never stored per sample."""

    count: int
    mean: Tensor  # [k], float64
    scatter: Tensor  # sum of outer products of deviations from the mean [k, k], float64

    @classmethod
    def of(cls, values: Tensor) -> MomentSums:
        """Moments of per-sample ``values`` [n, k]."""
        values = values.detach().to("cpu", torch.float64)
        mean = values.mean(0)
        deviation = values - mean
        return cls(len(values), mean, deviation.T @ deviation)

    def merge(self, other: MomentSums) -> MomentSums:
        """Moments of both sets of samples together (Chan, Golub, LeVeque 1983)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        mean = self.mean + gap * (other.count / count)
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return MomentSums(count, mean, self.scatter + other.scatter + between)

    def estimate(self) -> MeanEstimate:
        """Means and the covariance of the means."""
        if self.count < 2:
            unknown = torch.full_like(self.scatter, torch.nan)
            return MeanEstimate(self.mean, unknown, self.count)
        return MeanEstimate(self.mean, self.scatter / (self.count - 1) / self.count, self.count)


class QuadraticSums:
    """Slopes and curvatures along k directions, added up batch by batch."""

    def __init__(self) -> None:
        self._sums: tuple[MomentSums, MomentSums] | None = None

    def add(self, slopes: Tensor, curvatures: Tensor) -> None:
        """Add those of some samples, [n, k] each."""
        new = MomentSums.of(slopes), MomentSums.of(curvatures)
        if self._sums is not None:
            new = self._sums[0].merge(new[0]), self._sums[1].merge(new[1])
        self._sums = new

    def estimate(self) -> DirectionalQuadratic:
        """Means over all samples, of which there must be some."""
        if self._sums is None:
            raise ValueError(
                "batches or reference_loader gave no batches; give at least one sample."
            )
        return DirectionalQuadratic(*(total.estimate() for total in self._sums))


@dataclass(frozen=True, eq=False)
class DirectionalQuadratic:
    r"""A quadratic ½ xᵀ C x + gᵀ x seen along k unit directions u: slopes uᵀg, curvatures uᵀCu.

    Attributes:
        slope: per-sample means of uᵀ∇ℓ [k].
        curvature: per-sample means of uᵀ∇²ℓ u, or of its generalized Gauss-Newton part [k].
    """

    slope: MeanEstimate
    curvature: MeanEstimate

    def __post_init__(self) -> None:
        if self.slope.mean.shape != self.curvature.mean.shape:
            raise ValueError(
                f"slopes along {tuple(self.slope.mean.shape)} directions but curvatures along "
                f"{tuple(self.curvature.mean.shape)}; both must be measured along the same ones."
            )

    @property
    def n_directions(self) -> int:
        """Number of directions k."""
        return self.slope.mean.shape[0]

    @property
    def n_samples(self) -> int:
        """Number of samples that it was measured on."""
        return self.slope.n_samples

    def oriented(self, signs: Tensor) -> DirectionalQuadratic:
        """The same quadratic along the directions times ±1 [k]: slopes follow, curvatures stay."""
        flip = torch.diag(signs.to(self.slope.mean))
        return DirectionalQuadratic(self.slope.combine(flip), self.curvature)

    def select(self, indices: Tensor) -> DirectionalQuadratic:
        """Only the directions at ``indices``."""
        picked = (
            MeanEstimate(e.mean[indices], e.covariance[indices][:, indices], e.n_samples)
            for e in (self.slope, self.curvature)
        )
        return DirectionalQuadratic(*picked)
