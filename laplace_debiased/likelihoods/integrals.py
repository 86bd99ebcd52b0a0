"""Means of softmax and sigmoid under a Gaussian, deterministic and accurate, by roots of its Σ."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from laplace_debiased.network.grad_modes import outside_inference_mode

POINTS = 256
"""Points of the default link. On a public ResNet-20 at its tuned prior their KL to the integral is
0.2e-3 nats; 100 random draws have 2.5e-3."""

_SEED = 0

_RESOLUTION_BITS = 15
"""Points are multiples of 2⁻¹⁵; none exceeds 8 = 2³ in size, so that each has 18 bits."""

POINT_BITS = _RESOLUTION_BITS + 3


_MORE_POINTS = ((2.0, 12.0, 1024), (4.0, 32.0, 8192))
"""From which spread or stretch on a sample takes more points than 256, and how many.

The spread of its probabilities is Σ_c Var(p_c) / p̄_c over the 256 points: N random points have an
error (KL) of half of it over N. The stretch of its outputs is ‖diag(RᵀR)‖ for a root R of their
covariance, without what all outputs share: few directions of a large variance make steps in the
probabilities that 256 points do not resolve, also where one class is nearly certain (small spread).
Mean KL of 256, 1,024 and 8,192 points in 1e-3 nats, on a ResNet-20 at priors from 100 to 1e4
(``python -m benchmarks.link``): .1 / .02 / 0 at a stretch of 10, .7 / .1 / .01 at 28 and
3 / .5 / .03 above 100; random problems of 3 to 100 classes have less.
"""

PIVOTED_UP_TO = 64
"""Matrices up to this size are factored by pivoting; its C steps over [C, C] do not pay beyond."""

_WORKING_BYTES = 4 * 2**20
"""Function values that are held at a time: about what a processor's cache does."""

_WIDE = 4.0
"""Standard deviation from which on a sigmoid is integrated over its own, logistic, width."""

InverseLink = Callable[[Tensor], Tensor]
"""From outputs [..., C] to probabilities [..., C]."""

Values = Callable[[Tensor], Tensor]
"""From probabilities [m, C, n] at n points to what is averaged over them, [m, ..., n]."""


@lru_cache(maxsize=32)
def normal_points(n_dimensions: int, n_points: int) -> Tensor:
    """Standard normal points [n_dimensions, n_points], float64, on the CPU, always the same.

    A scrambled Sobol sequence (Owen 1998) of a fixed seed through the inverse normal distribution
    function; a longer set begins with the shorter one. Beyond 21,201 dimensions, where no Sobol
    sequence is tabulated, seeded pseudo-random points. The result is shared: do not change it.
    """
    with outside_inference_mode(), torch.no_grad():
        if n_dimensions <= torch.quasirandom.SobolEngine.MAXDIM:
            engine = torch.quasirandom.SobolEngine(n_dimensions, scramble=True, seed=_SEED)
            uniform = engine.draw(n_points, dtype=torch.float64)
            half_step = 0.5**31  # the sequence has 30 bits, and the first point may be zero
            normal = math.sqrt(2.0) * torch.erfinv(2.0 * uniform.clamp_min(half_step) - 1.0)
        else:
            generator = torch.Generator().manual_seed(_SEED)
            shape = (n_points, n_dimensions)
            normal = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-7.9, 7.9)
        scale = 2.0**_RESOLUTION_BITS
        return (normal * scale).round().div_(scale).T.contiguous()


def softmax(outputs: Tensor) -> Tensor:
    """Probabilities of classes that exclude each other [..., C]."""
    return torch.softmax(outputs, dim=-1)


def mean_softmax(
    mean: Tensor,
    covariance: Tensor | None = None,
    n_points: int | None = None,
    *,
    root: Tensor | None = None,
) -> Tensor:
    """E[softmax(f)] [..., C] for f ~ N(μ, Σ) over fixed quasi-random points.

    The points are the same for every sample, and the result of a sample does not depend on the
    others in its batch. Without ``n_points`` they are 256, and 1,024 or 8,192 where the outputs of
    a sample are so uncertain that 256 leave an error above 0.2e-3 nats. The columns of a root that
    matter most come first. Arguments as in :func:`links.monte_carlo`.
    """
    shape, scaling = mean.shape, _scaling(mean, covariance, root)
    mean = mean.reshape(-1, shape[-1])
    first = _average(mean, scaling, n_points or POINTS, lambda p: torch.stack([p, p.square()], 1))
    probabilities, squares = first[..., 0, :], first[..., 1, :]
    if n_points is None:
        tiny = torch.finfo(mean.dtype).tiny
        spread = (squares / probabilities.clamp_min(tiny)).sum(-1).detach() - 1.0
        stretch = _stretch(scaling.detach())
        level = torch.zeros_like(spread, dtype=torch.long)
        for spread_from, stretch_from, _ in _MORE_POINTS:
            level += (spread >= spread_from) | (stretch >= stretch_from)
        for reached, (_, _, more) in enumerate(_MORE_POINTS, start=1):
            rows = (level == reached).nonzero().squeeze(-1)
            if len(rows):
                finer = _average(mean[rows], scaling[rows], more, lambda p: p)
                probabilities = probabilities.index_put((rows,), finer)
    return probabilities.reshape(shape)


def _stretch(scaling: Tensor) -> Tensor:
    """‖diag(RᵀR)‖ [m] of roots R, centred over the outputs; see ``_MORE_POINTS``."""
    wide = scaling.double()
    if wide.ndim == 2:
        return wide.pow(4).sum(-1).sqrt()
    wide = wide - wide.mean(1, keepdim=True)
    return wide.square().sum(1).square().sum(-1).sqrt()


def mutual_information(
    mean: Tensor,
    covariance: Tensor | None = None,
    inverse_link: InverseLink = softmax,
    *,
    root: Tensor | None = None,
) -> Tensor:
    """What the label would tell about the outputs [...]: the epistemic part of the entropy.

    H(E p) − E H(p), in nats (Depeweg et al. 2018; Houlsby et al. 2011), both over the same 256
    points, so that it is never negative but for rounding; with a sigmoid by quadrature, and summed
    over the labels. Arguments as in :func:`links.monte_carlo`.
    """
    if inverse_link is torch.sigmoid:
        variance = variances(mean, covariance, root).double()
        within = _over_labels(mean, variance, _entropy, _wide_entropy)
        p = mean_sigmoid(mean.double(), variance)
        total = torch.special.entr(p) + torch.special.entr(1.0 - p)
        return (total.to(mean.dtype) - within).clamp_min(0.0).sum(-1)
    shape, scaling = mean.shape, _scaling(mean, covariance, root)
    averages = _average(
        mean.reshape(-1, shape[-1]),
        scaling,
        POINTS,
        lambda p: torch.cat([p, torch.special.entr(p).sum(1, keepdim=True)], dim=1),
    )
    total = torch.special.entr(averages[:, :-1]).sum(-1)
    return (total - averages[:, -1]).clamp_min(0.0).reshape(shape[:-1])


def mean_sigmoid(mean: Tensor, variance: Tensor) -> Tensor:
    r"""E[sigmoid(f)] [...] for f ~ N(μ, s²), one label at a time: exact to 1e-8.

    By trapezoid rules, which converge exponentially for such weights: for s < 4 over the Gaussian
    (97 points; Gauss–Hermite of that size has a hundred times the error); beyond, where the sigmoid
    is steep against it, over the logistic distribution, E[Φ((μ − t)/s)].
    """
    return _over_labels(mean, variance, torch.sigmoid, _wide_sigmoid)


def _over_labels(
    mean: Tensor,
    variance: Tensor,
    function: Callable[[Tensor], Tensor],
    wide: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """E[function(f)], by ``wide(standardised nodes, s)`` where f varies more than the function."""
    # A deviation of zero would leave the wide rule 0/0, whose derivative poisons the other branch.
    mu, deviation = mean.double(), variance.double().clamp_min(1e-60).sqrt()
    z = torch.arange(-12.0, 12.25, 0.25, dtype=torch.float64, device=mean.device)
    weights = torch.softmax(-0.5 * z.square(), 0)
    narrow = (function(mu.unsqueeze(-1) + deviation.unsqueeze(-1) * z) * weights).sum(-1)
    is_wide = deviation >= _WIDE
    if not bool(is_wide.any()):
        return narrow.to(mean.dtype)
    at_least = deviation.clamp_min(_WIDE).unsqueeze(-1)
    integral = wide((mu.unsqueeze(-1) - _wide_nodes(mu.device)) / at_least, at_least)
    return torch.where(is_wide, integral, narrow).to(mean.dtype)


def _wide_nodes(device: torch.device) -> Tensor:
    return torch.arange(-40.0, 40.5, 0.5, dtype=torch.float64, device=device)


def _wide_sigmoid(standardised: Tensor, deviation: Tensor) -> Tensor:
    """E[sigmoid(f)] = E[Φ((μ − t)/s)] over a logistic t."""
    t = _wide_nodes(standardised.device)
    slopes = torch.sigmoid(t) * torch.sigmoid(-t)
    return (torch.special.ndtr(standardised) * (slopes / slopes.sum())).sum(-1)


def _wide_entropy(standardised: Tensor, deviation: Tensor) -> Tensor:
    """E[H(sigmoid(f))] over t = f: the entropy vanishes within the nodes."""
    density = (-0.5 * standardised.square()).exp() / (deviation * math.sqrt(2.0 * math.pi))
    return (density * _entropy(_wide_nodes(standardised.device))).sum(-1) * 0.5


def _entropy(logit: Tensor) -> Tensor:
    p, q = torch.sigmoid(logit), torch.sigmoid(-logit)
    return torch.special.entr(p) + torch.special.entr(q)


def variances(mean: Tensor, covariance: Tensor | None, root: Tensor | None) -> Tensor:
    """Variances [..., C] of outputs whose covariance, its diagonal or a root of it is given."""
    if root is not None:
        return root.square().sum(-1)
    assert covariance is not None, "either the covariance or a root of it is needed"
    diagonal = covariance.shape == mean.shape
    return covariance if diagonal else covariance.diagonal(dim1=-2, dim2=-1)


def _scaling(mean: Tensor, covariance: Tensor | None, root: Tensor | None) -> Tensor:
    """A root [m, C, R] of the covariance, or deviations [m, C] of independent outputs."""
    n_outputs = mean.shape[-1]
    if root is not None:
        return root.reshape(-1, n_outputs, root.shape[-1])
    assert covariance is not None, "either the covariance or a root of it is needed"
    if covariance.shape == mean.shape:
        return covariance.reshape(-1, n_outputs).clamp_min(0.0).sqrt()
    matrices = covariance.reshape(-1, n_outputs, n_outputs)
    if n_outputs <= PIVOTED_UP_TO:
        return pivoted_root(centred(matrices))
    return symmetric_root(matrices)


def _average(mean: Tensor, scaling: Tensor, n_points: int, values: Values) -> Tensor:
    """Mean of ``values`` over the points, in chunks of samples and of points [m, ...]."""
    points = normal_points(scaling.shape[-1], n_points).to(mean.device)
    per_chunk = min(n_points, 1024)
    step = max(1, _WORKING_BYTES // (8 * max(1, mean.shape[-1]) * per_chunk))
    averages = []
    for mu, scale in zip(mean.split(step), scaling.split(step), strict=True):
        total: Tensor | None = None
        for some in points.split(per_chunk, dim=1):
            outputs = mu.unsqueeze(-1) + _scaled(scale, some).to(mu.dtype)
            part = values(torch.softmax(outputs, dim=1)).sum(-1)
            total = part if total is None else total + part
        assert total is not None
        averages.append(total / n_points)
    return torch.cat(averages)


def _scaled(scaling: Tensor, points: Tensor) -> Tensor:
    """Deviations from the mean [m, C, n] at the points [R, n], in float64 and without rounding.

    A matrix product is rounded in an order that depends on its shape, and so on the batch. Here
    every factor is cut to so few bits that float64 holds all sums exactly, and the order is void:
    entries of the root keep 24 bits or more relative to the sample's largest one, up to 2,048
    columns.
    """
    if scaling.ndim == 2:
        return scaling.double().unsqueeze(-1) * points
    wide = scaling.double()
    largest = wide.detach().abs().amax((-2, -1), keepdim=True).clamp_min(1e-100)
    bits = 52 - POINT_BITS - math.ceil(math.log2(max(2, scaling.shape[-1])))
    unit = torch.exp2(torch.ceil(torch.log2(largest)) - bits)
    exact = (wide.detach() / unit).round() * unit
    if scaling.requires_grad:
        exact = wide + (exact - wide.detach())
    return torch.matmul(exact, points)


# -- square roots of covariance matrices that may be singular ---------------------------------


def centred(covariance: Tensor) -> Tensor:
    """Covariance [..., C, C] of f − mean_c f_c: without the shift that a softmax does not see."""
    rows = covariance.mean(-1)
    return covariance - rows.unsqueeze(-1) - rows.unsqueeze(-2) + rows.mean(-1)[..., None, None]


def pivoted_root(covariance: Tensor) -> Tensor:
    """L [m, C, C] with L Lᵀ = Σ by Cholesky with diagonal pivoting, of any rank.

    Its columns explain the variance greedily, as quasi-random points want it: their first
    dimensions are the most even ones. At equal points the error is a third of a plain Cholesky
    factor's and about that of the eigenvectors. What is left below the dtype's resolution counts
    as zero, so that a singular matrix needs no second attempt. Elementwise operations only: the
    root of a matrix does not depend on its batch.
    """
    rest, columns = covariance, []
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    n = covariance.shape[-1]
    floor = diagonal.amax(-1) * (n * torch.finfo(covariance.dtype).eps)
    tiny = torch.finfo(covariance.dtype).tiny
    # A centred matrix of rank one has its two largest variances equal but for rounding.
    first = torch.linspace(1.0, 0.999, n, dtype=covariance.dtype, device=covariance.device)
    for _ in range(n):
        left = rest.diagonal(dim1=-2, dim2=-1)
        pivot = (left.detach() * first).argmax(-1)
        variance = left.gather(-1, pivot.unsqueeze(-1)).squeeze(-1)
        column = rest.gather(-1, pivot[:, None, None].expand(-1, n, 1)).squeeze(-1)
        counts = (variance > floor).unsqueeze(-1)
        # A clamp inside the root, too: its derivative at zero is infinite.
        scaled = column / variance.clamp_min(tiny).sqrt().unsqueeze(-1)
        column = torch.where(counts, scaled, torch.zeros_like(column))
        columns.append(column)
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
    return torch.stack(columns, dim=-1)


def symmetric_root(covariance: Tensor) -> Tensor:
    """L [..., C, C] with L Lᵀ = Σ: Cholesky factors, eigenvectors where a matrix has none.

    A covariance of low rank (more outputs than weights) has no Cholesky factor in floating point;
    only the matrices that fail take the slower way.
    """
    root, info = torch.linalg.cholesky_ex(covariance)
    failed = info != 0
    if not bool(failed.any()):
        return root
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance[failed])
    eigen_root = eigenvectors * eigenvalues.clamp_min(0.0).sqrt().unsqueeze(-2)
    return root.masked_fill(failed[..., None, None], 0.0).index_put((failed,), eigen_root)
