"""The bias in closed form, and by enumeration of a finite population."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from laplace_debiased.diagnostics.laboratory import oriented_eigenvectors, quadratic_along


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
    """
    size = len(inputs)
    n_pairs = math.comb(size, batch_size) * math.comb(size - batch_size, batch_size)
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
    log_ratio = math.lgamma((batch_size + 1) / 2) - math.lgamma(batch_size / 2 + 1)
    return 1.0 + math.exp(log_ratio) * math.sqrt(math.pi) / 2.0
