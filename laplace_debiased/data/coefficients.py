"""How much each sample counts in a mean: c_n of λ(u) = Σ_n c_n x_n(u)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from laplace_debiased.data.plan import CurvaturePlan
from laplace_debiased.data.sources import Draws

_NEGLIGIBLE = 1 / 24


def draw_coefficients(plan: CurvaturePlan, batch: Draws, folds: Collection[int]) -> Tensor:
    """Coefficients [m] float64 of the mean over the draws of some folds of a plan.

    c_n = count_n w_n / m for samples in ``folds`` (m their draws in all), 0 for others; over a walk
    they sum to 1 for uniform draws. These give the factors that directions come from, and curvature
    on its own batch.
    """
    total = sum(plan.fold_sizes[k] for k in folds)
    value = batch.counts.double() * batch.weights / total
    return torch.where(_in(batch, folds), value, 0.0)


def magnitude_coefficients(
    plan: CurvaturePlan, batch: Draws, basis_folds: Collection[int]
) -> Tensor:
    """Coefficients [m] float64 that make λ(u) unbiased along directions from ``basis_folds``.

    All other folds are B̃. With D the distinct samples of ``basis_folds``, Z = 1 − Σ_{n∈D} q_n,

        λ(u) = (1/M) Σ_{n∈D} x_n(u) + (1/m̃) Σ_{n∈B̃} count_n Z x_n(u) / (M q_n)

    is unbiased for the mean over the pool given D, so given the directions: B̃ knows nothing of D
    itself, and D is known exactly. For uniform draws without replacement this is
    (m_D/M)·own + (1 − m_D/M)·other.

    Where the pool is itself a uniform sample of a larger population of P (a ``Subset`` with
    ``n_data``, a sampler, a capped pool), what of the pool is outside D stands for all of the
    population that is outside D:

        λ(u) = (1/P) Σ_{n∈D} x_n(u) + (1 − m_D/P) · (mean over the pool outside D, as above),

    m_D the distinct samples of D: exactly (m_D/P)·own + (1 − m_D/P)·other for uniform draws, which
    is unbiased for the population's mean given D. For weighted draws from a pool that is a sample
    it is so up to how the normaliser Σh depends on which samples the pool holds, O(1/M).

    Where the population is unknown the own part is left out: λ(u) = mean over the draws of B̃. So it
    is where its weight is negligible, m_D/P ≤ 1/(24√m̃); what of the pool is outside D then stands
    for D as well. A magnitude is a mean of m̃ squares, of a relative standard error of 1/√m̃ or more.
    Draws by curvature weigh up to six times the mean, and along the direction in which D
    exaggerates most it does so four or five times: leaving D out moves the magnitude by no more
    than its standard error. D is then spared its projections, half of all. The sizes alone decide,
    never what was drawn: that would be a bias of its own.

    Weighted draws of B̃ are a sample of the rest of the pool given D where B̃ is one fold: any, if
    the folds were drawn symmetrically, else the last (``data.pool.draw_weighted_folds``).
    """
    basis = frozenset(basis_folds)
    n_magnitude = sum(plan.fold_sizes[k] for k in range(plan.n_folds) if k not in basis)
    other = batch.counts.double() * batch.weights / n_magnitude
    own, unseen = _own_and_unseen(plan, basis, n_magnitude)
    return torch.where(_in(batch, basis), own, other * unseen)


def _own_and_unseen(
    plan: CurvaturePlan, basis: frozenset[int], n_magnitude: int
) -> tuple[float, float]:
    """Weight of a sample of the directions' folds, and the mass that the m̃ draws stand for."""
    if plan.population is None or plan.pool_size is None or plan.unseen_mass is None:
        return 0.0, 1.0
    unseen = max(0.0, 1 - sum(1 - plan.unseen_mass[k] for k in basis))
    seen_mass = (1 - unseen) * plan.pool_size / plan.population
    if plan.population > plan.pool_size:
        seen = sum(plan.distinct_sizes[k] for k in basis)
        shares = (1 - seen / plan.population) / (1 - seen / plan.pool_size)
        unseen *= shares
    n_directions = sum(plan.fold_sizes[k] for k in basis)
    if n_directions / plan.population <= _NEGLIGIBLE * n_magnitude**-0.5:
        return 0.0, seen_mass + unseen
    return 1 / plan.population, unseen


def _in(batch: Draws, folds: Collection[int]) -> Tensor:
    return torch.isin(batch.folds, torch.tensor(sorted(folds), dtype=torch.int64))
