r"""From Gaussian network outputs to predictive probabilities.

Given f ~ N(μ, Σ) per sample, these approximate E[softmax(f)], or E[sigmoid(f)] for binary labels.
They are laplace-torch's link approximations as pure functions: nothing is changed in place, "mc" is
deterministic unless it is given a generator, and no global random number is drawn for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from laplace_debiased.checks import checked_integer
from laplace_debiased.likelihoods.integrals import (
    POINTS,
    InverseLink,
    mean_sigmoid,
    mean_softmax,
    softmax,
    symmetric_root,
    variances,
)


def probit(mean: Tensor, variance: Tensor, inverse_link: InverseLink = softmax) -> Tensor:
    r"""Multi-class probit approximation (MacKay 1992; Daxberger et al. 2021, eq. 8).

    Probabilities softmax(μ / √(1 + π/8 · diag Σ)) [..., C] of μ and diag Σ [..., C]; with a sigmoid
    it is MacKay's own, for one label at a time.
    """
    return inverse_link(mean / torch.sqrt(1.0 + math.pi / 8.0 * variance))


def monte_carlo(
    mean: Tensor,
    covariance: Tensor | None = None,
    n_samples: int | None = None,
    generator: torch.Generator | None = None,
    inverse_link: InverseLink = softmax,
    *,
    root: Tensor | None = None,
) -> Tensor:
    """Mean of the inverse link over f: deterministic, or over random draws of a generator.

    Without a generator softmax is averaged over fixed quasi-random points (:func:`mean_softmax`),
    the same for every sample, batch and prior precision; a sigmoid is integrated by quadrature, for
    which ``n_samples`` does not matter.

    Args:
        mean: μ [..., C].
        covariance: Σ [..., C, C], or its diagonal [..., C] for independent outputs.
        n_samples: number of points or draws; None for 256 (more where 256 are not enough).
        generator: source of random draws, one noise for all samples.
        inverse_link: softmax, or sigmoid.
        root: [..., C, R] with root · rootᵀ = Σ, in place of ``covariance``.

    Returns:
        Probabilities [..., C].

    Raises:
        ValueError: if ``n_samples`` is not positive.
    """
    _check_count(n_samples)
    if generator is not None:
        draws = gaussian_samples(mean, covariance, n_samples or POINTS, generator, root=root)
        return inverse_link(draws).mean(0)
    if inverse_link is torch.sigmoid:
        return mean_sigmoid(mean, variances(mean, covariance, root))
    return mean_softmax(mean, covariance, n_samples, root=root)


def gaussian_samples(
    mean: Tensor,
    covariance: Tensor | None,
    n_samples: int,
    generator: torch.Generator | None = None,
    *,
    root: Tensor | None = None,
) -> Tensor:
    """Draws from N(μ_n, Σ_n) for every n, [n_samples, ..., C], with one noise for all n.

    Sharing the noise over n keeps draws of different inputs comparable, as in laplace-torch. The
    square root is a Cholesky factor, or an eigendecomposition where a covariance of low rank (more
    outputs than weights) has none; or it is given, as ``root`` [..., C, R].

    Raises:
        ValueError: if ``n_samples`` is not positive.
    """
    _check_count(n_samples)
    if root is None and covariance is not None and covariance.shape != mean.shape:
        root = symmetric_root(covariance)
    n_columns = mean.shape[-1] if root is None else root.shape[-1]
    noise = torch.randn(
        (n_columns, n_samples), generator=generator, device=mean.device, dtype=mean.dtype
    )
    if root is None:
        deviations = variances(mean, covariance, None).clamp_min(0.0).sqrt()
        scaled = deviations.unsqueeze(-1) * noise
    else:
        scaled = root @ noise
    return (mean.unsqueeze(-1) + scaled).movedim(-1, 0)


_MOST_POINTS = 2**30
"""Points of a Sobol sequence that torch makes."""


def _check_count(n_samples: int | None) -> None:
    if n_samples is not None and checked_integer("n_samples", n_samples) > _MOST_POINTS:
        raise ValueError(f"n_samples must be at most 2**30; got {n_samples}.")


def laplace_bridge(mean: Tensor, covariance: Tensor, *, normalise: bool = False) -> Tensor:
    r"""Laplace bridge: mean of the Dirichlet matched to N(μ, Σ) (Hobbhahn et al. 2022, eq. 6).

    Probabilities [m, C] of μ [m, C] and Σ [m, C, C]. The Gaussian is first conditioned on
    Σ_c f_c = 0. ``normalise`` divides by the mean variance first: laplace-torch's "bridge_norm".
    """
    return bridge_of_sums(
        mean, covariance.sum(-1), covariance.diagonal(dim1=-2, dim2=-1), normalise=normalise
    )


def bridge_of_sums(
    mean: Tensor, row_sums: Tensor, variances: Tensor, *, normalise: bool = False
) -> Tensor:
    """:func:`laplace_bridge` from all that it reads of Σ: row sums and diagonal, [..., C] each."""
    n_classes = mean.shape[-1]
    total = row_sums.sum(-1)
    mean = mean - row_sums * (mean.sum(-1) / total).unsqueeze(-1)
    variance = variances - row_sums.square() / total.unsqueeze(-1)
    if normalise:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(n_classes / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    # α_c ∝ (1 − 2/C + e^{μ_c} Σ_k e^{−μ_k} / C²) / Σ_cc, in logarithms: e^μ overflows at μ = 89.
    ratio = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(n_classes)
    constant = torch.full_like(ratio, 1 - 2 / n_classes).log()
    return torch.softmax(torch.logaddexp(constant, ratio) - variance.log(), dim=-1)
