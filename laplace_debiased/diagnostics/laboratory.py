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

    Of inputs [..., m, d], targets [..., m, 1] and weights [d] along directions [..., d, k].
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
