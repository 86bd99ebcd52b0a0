r"""From Gaussian network outputs to predictive probabilities.

Given f ~ N(μ, Σ) per sample, these approximate E[softmax(f)], or E[sigmoid(f)] for binary labels.
They are laplace-torch's link approximations as pure functions: nothing is changed in place and
every random draw comes from the caller's generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

InverseLink = Callable[[Tensor], Tensor]
"""From outputs [..., C] to probabilities [..., C]."""


def softmax(outputs: Tensor) -> Tensor:
    """Probabilities of classes that exclude each other [..., C]."""
    return torch.softmax(outputs, dim=-1)


def probit(mean: Tensor, variance: Tensor, inverse_link: InverseLink = softmax) -> Tensor:
    r"""Multi-class probit approximation (MacKay 1992; Daxberger et al. 2021, eq. 8).

    softmax(μ / √(1 + π/8 · diag Σ)); with a sigmoid it is MacKay's own, for one label at a time.

    Args:
        mean: μ [..., m, C].
        variance: diag Σ [..., m, C].
        inverse_link: softmax, or sigmoid.

    Returns:
        Probabilities [..., m, C].
    """
    return inverse_link(mean / torch.sqrt(1.0 + math.pi / 8.0 * variance))


def monte_carlo(
    mean: Tensor,
    covariance: Tensor,
    n_samples: int,
    generator: torch.Generator | None = None,
    inverse_link: InverseLink = softmax,
) -> Tensor:
    """Mean of the inverse link over draws of f.

    Args:
        mean: μ [..., C].
        covariance: Σ [..., C, C], or its diagonal [..., C] for independent outputs.
        n_samples: number of draws.
        generator: source of the draws; None for torch's global one.
        inverse_link: softmax, or sigmoid.

    Returns:
        Probabilities [..., C].
    """
    return inverse_link(gaussian_samples(mean, covariance, n_samples, generator)).mean(0)


def gaussian_samples(
    mean: Tensor, covariance: Tensor, n_samples: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draws from N(μ_n, Σ_n) for every n, [n_samples, ..., C], with one noise for all n.

    Sharing the noise over n keeps draws of different inputs comparable, as in laplace-torch. The
    square root is a Cholesky factor, or an eigendecomposition where a covariance of low rank (more
    outputs than weights) has none.

    Raises:
        ValueError: if ``n_samples`` is not positive.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1; got {n_samples}.")
    n_outputs = mean.shape[-1]
    noise = torch.randn(
        (n_outputs, n_samples), generator=generator, device=mean.device, dtype=mean.dtype
    )
    if covariance.shape == mean.shape:
        scaled = covariance.clamp_min(0.0).sqrt().unsqueeze(-1) * noise
    else:
        scaled = _symmetric_root(covariance) @ noise
    return (mean.unsqueeze(-1) + scaled).movedim(-1, 0)


def laplace_bridge(mean: Tensor, covariance: Tensor, *, normalise: bool = False) -> Tensor:
    r"""Laplace bridge: mean of the Dirichlet matched to N(μ, Σ) (Hobbhahn et al. 2022, eq. 6).

    The Gaussian is first conditioned on Σ_c f_c = 0. ``normalise`` is laplace-torch's variance
    correction ("bridge_norm").

    Args:
        mean: μ [m, C].
        covariance: Σ [m, C, C].
        normalise: divide by the mean variance first.

    Returns:
        Probabilities [m, C].
    """
    n_classes = mean.shape[-1]
    row_sums = covariance.sum(-1)
    total = row_sums.sum(-1)
    mean = mean - row_sums * (mean.sum(-1) / total).unsqueeze(-1)
    variance = covariance.diagonal(dim1=-2, dim2=-1) - row_sums.square() / total.unsqueeze(-1)
    if normalise:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(n_classes / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    # α_c ∝ (1 − 2/C + e^{μ_c} Σ_k e^{−μ_k} / C²) / Σ_cc, in logarithms: e^μ overflows at μ = 89.
    ratio = mean + torch.logsumexp(-mean, -1, keepdim=True) - 2 * math.log(n_classes)
    constant = torch.full_like(ratio, 1 - 2 / n_classes).log()
    return torch.softmax(torch.logaddexp(constant, ratio) - variance.log(), dim=-1)


def _symmetric_root(covariance: Tensor) -> Tensor:
    try:
        return torch.linalg.cholesky(covariance)
    except torch.linalg.LinAlgError:
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        return eigenvectors * eigenvalues.clamp_min(0.0).sqrt().unsqueeze(-2)
