r"""Problems in which the mini-batch bias is known exactly.

A linear model f = xᵀw with ½ squared error has the per-sample GGN (and Hessian) x xᵀ: on a batch,
the sample covariance Σ̂ = 1/m Σ_n x_n x_nᵀ; on the population, Σ. Nothing else happens, so each
cause of bias can be had alone:

* *Curvature bias* (misaligned eigenspaces): noise 0 and w at the optimum, so that all slopes are 0
  and only Σ̂'s eigenvectors differ from Σ's.
* *Slope bias* (regression to the mean): one input dimension, so that there is but one direction
  and its curvature is unbiased, and the sign of the direction is all that the batch chooses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from laplace_debiased.diagnostics.estimates import MeanEstimate, MomentSums


@dataclass(frozen=True)
class LinearRegressionLab:
    r"""Linear regression on Gaussian inputs of known covariance.

    x ~ N(0, diag(spectrum)), y = σε, ε ~ N(0, 1); the weights are ``offset`` away from the optimum
    w* = 0. That the covariance is diagonal and the optimum 0 loses nothing: a rotation and a shift
    make any other problem of this kind.

    Attributes:
        spectrum: eigenvalues of the population's curvature, per-sample mean; d of them.
        noise_std: σ.
        offset: weights w [d]; empty means all zero, the optimum.
    """

    spectrum: tuple[float, ...]
    noise_std: float = 0.0
    offset: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.spectrum or not all(0.0 <= s < math.inf for s in self.spectrum):
            raise ValueError(f"spectrum must hold finite values ≥ 0; got {self.spectrum!r}.")
        if not 0.0 <= self.noise_std < math.inf:
            raise ValueError(f"noise_std must be finite and ≥ 0; got {self.noise_std!r}.")
        if self.offset and len(self.offset) != len(self.spectrum):
            raise ValueError(
                f"offset has {len(self.offset)} entries, spectrum {len(self.spectrum)}; they must "
                "be equally long (or leave offset empty)."
            )

    @classmethod
    def power_law(cls, n_dimensions: int, exponent: float = 1.0) -> LinearRegressionLab:
        """Spectrum j^−exponent for j = 1..d: the shape that networks' curvature has."""
        return cls(tuple(float(j) ** -exponent for j in range(1, n_dimensions + 1)))

    @property
    def weights(self) -> Tensor:
        """The model's weights [d], float64."""
        zero = (0.0,) * len(self.spectrum)
        return torch.tensor(self.offset or zero, dtype=torch.float64)

    def model(self) -> nn.Linear:
        """The linear model at its weights, float64."""
        linear = nn.utils.skip_init(
            nn.Linear, len(self.spectrum), 1, bias=False, dtype=torch.float64
        )
        with torch.no_grad():
            linear.weight.copy_(self.weights[None])
        return linear

    def batch(self, n_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh inputs [n, d] and targets [n, 1]."""
        scale = torch.tensor(self.spectrum, dtype=torch.float64).sqrt()
        noise = torch.randn(n_samples, len(scale) + 1, generator=generator, dtype=torch.float64)
        return noise[:, :-1] * scale, self.noise_std * noise[:, -1:]

    def population_curvature(self, directions: Tensor) -> Tensor:
        """uᵀΣu [..., k] along the columns of ``directions`` [..., d, k]."""
        return directions.square().mT @ torch.tensor(self.spectrum, dtype=directions.dtype)

    def population_slope(self, directions: Tensor) -> Tensor:
        """uᵀΣw [..., k]: the expected loss's slopes along columns of ``directions`` [..., d, k]."""
        spectrum = torch.tensor(self.spectrum, dtype=directions.dtype)
        return directions.mT @ (spectrum * self.weights.to(directions))

    def expected_bias(
        self, batch_size: int, n_draws: int, generator: torch.Generator
    ) -> RankwiseBias:
        """Monte-Carlo means by rank over ``n_draws`` pairs of batches, with their errors.

        Args:
            batch_size: samples per batch m.
            n_draws: pairs.
            generator: source of all draws.
        """
        shape = (n_draws, batch_size)
        (own_x, own_y), (other_x, other_y) = (
            (x.unflatten(0, shape), y.unflatten(0, shape))
            for x, y in (self.batch(n_draws * batch_size, generator) for _ in range(2))
        )
        directions = oriented_eigenvectors(own_x, own_y, self.weights)
        values = (
            *quadratic_along(own_x, own_y, self.weights, directions),
            *quadratic_along(other_x, other_y, self.weights, directions),
            self.population_slope(directions),
            self.population_curvature(directions),
        )
        return RankwiseBias(*(MomentSums.of(value).estimate() for value in values))


@dataclass(frozen=True, eq=False)
class RankwiseBias:
    """Expected slopes and curvatures by rank of the own batch's eigenvalue [d], with errors.

    Directions are oriented so that the own slope is not negative.

    Attributes:
        own_slope: on the batch that chose the directions.
        own_curvature: likewise.
        other_slope: on another batch.
        other_curvature: likewise.
        population_slope: exact, along the same directions.
        population_curvature: likewise.
    """

    own_slope: MeanEstimate
    own_curvature: MeanEstimate
    other_slope: MeanEstimate
    other_curvature: MeanEstimate
    population_slope: MeanEstimate
    population_curvature: MeanEstimate


def quadratic_along(
    inputs: Tensor, targets: Tensor, weights: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Slopes and curvatures [..., k] of linear regression, per-sample means, in closed form.

    Args:
        inputs: [..., m, d].
        targets: [..., m, 1].
        weights: w [d].
        directions: [..., d, k].
    """
    along = inputs @ directions
    residuals = inputs @ weights.unsqueeze(-1) - targets
    return (along * residuals).mean(-2), along.square().mean(-2)


def oriented_eigenvectors(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Eigenvectors [..., d, d] of a batch's curvature, top first, own slope not negative."""
    covariance = inputs.mT @ inputs / inputs.shape[-2]
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
    slopes, _ = quadratic_along(inputs, targets, weights, directions)
    return directions * torch.where(slopes < 0, -1.0, 1.0).to(inputs).unsqueeze(-2)


@dataclass(frozen=True, eq=False)
class ExactBias:
    """Expectations over all ordered pairs of disjoint batches of a finite population, by rank [d].

    Attributes:
        own: curvature on the batch that chose the directions.
        other: curvature on the disjoint batch.
        population: curvature on the whole population along the same directions.
        own_slope: slope on the batch that chose (and oriented) the directions.
        other_slope: slope on the disjoint batch.
        population_slope: slope on the whole population.
        n_pairs: number of pairs that were enumerated.
    """

    own: Tensor
    other: Tensor
    population: Tensor
    own_slope: Tensor
    other_slope: Tensor
    population_slope: Tensor
    n_pairs: int


def enumerate_batch_pairs(
    inputs: Tensor, targets: Tensor, weights: Tensor, batch_size: int
) -> ExactBias:
    """The bias in a finite population of linear regression, by walking through every pair.

    Args:
        inputs: the population [M, d], float64.
        targets: [M, 1].
        weights: w [d].
        batch_size: m, with 2m ≤ M. There are (M choose m)(M−m choose m) pairs.

    Raises:
        ValueError: if two disjoint batches do not fit, or there are more than 10⁶ pairs.
    """
    size = len(inputs)
    if batch_size < 1 or 2 * batch_size > size:
        raise ValueError(f"two disjoint batches of {batch_size} do not fit into {size} samples.")
    n_pairs = math.comb(size, batch_size) * math.comb(size - batch_size, batch_size)
    if n_pairs > 10**6:
        raise ValueError(f"{n_pairs} pairs are too many to enumerate; use a smaller population.")
    own = torch.tensor(list(combinations(range(size), batch_size)))
    directions = oriented_eigenvectors(inputs[own], targets[own], weights)
    everything = torch.arange(size)
    rest = torch.stack([everything[~torch.isin(everything, batch)] for batch in own])
    within = torch.tensor(list(combinations(range(size - batch_size), batch_size)))
    other = rest[:, within]  # [batches, pairs of each, m]
    at_own = quadratic_along(inputs[own], targets[own], weights, directions)
    at_other = quadratic_along(inputs[other], targets[other], weights, directions.unsqueeze(1))
    at_all = quadratic_along(inputs, targets, weights, directions)
    return ExactBias(
        own=at_own[1].mean(0),
        other=at_other[1].mean((0, 1)),
        population=at_all[1].mean(0),
        own_slope=at_own[0].mean(0),
        other_slope=at_other[0].mean((0, 1)),
        population_slope=at_all[0].mean(0),
        n_pairs=n_pairs,
    )


def isotropic_plane_top_curvature(batch_size: int) -> float:
    r"""E[λ_max(Σ̂)] for x ~ N(0, I) in two dimensions, where every direction's curvature is 1.

    With r = 2√(λ₁λ₂)/(λ₁+λ₂) ~ Beta(m − 1, 1), independent of the trace (the sphericity
    statistic; Mauchly 1940, Anderson 2003 § 10.7), λ_max = ½ trace (1 + √(1 − r²)), hence

        E λ_max = 1 + Γ(½(m+1)) Γ(3/2) / Γ(½m + 1),

    which is 2 at m = 1 and falls to 1 like √(π/(2m)).

    Args:
        batch_size: m.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    log_ratio = math.lgamma((batch_size + 1) / 2) - math.lgamma(batch_size / 2 + 1)
    return 1.0 + math.exp(log_ratio) * math.sqrt(math.pi) / 2.0
