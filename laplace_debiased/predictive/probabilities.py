"""From output moments or weight samples to predictions: the calls of ``la(x)``, as functions."""

from __future__ import annotations

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor

from laplace_debiased.likelihoods import (
    ChosenMoments,
    InverseLink,
    laplace_bridge,
    monte_carlo,
    mutual_information,
    probit,
    softmax,
)


def needs_covariance(
    link: LinkApprox, diagonal_output: bool, inverse_link: InverseLink = softmax
) -> bool:
    """Whether a link approximation reads more than the output variances.

    The probability of one binary label depends on its own logit only.
    """
    match link:
        case LinkApprox.PROBIT:
            return False
        case LinkApprox.MC:
            return not diagonal_output and inverse_link is not torch.sigmoid
        case LinkApprox.BRIDGE | LinkApprox.BRIDGE_NORM:
            return True
    raise ValueError(f"unknown link approximation {link!r}.")


def class_probabilities(
    mean: Tensor,
    covariance: Tensor,
    link: LinkApprox,
    n_samples: int | None = None,
    generator: torch.Generator | None = None,
    inverse_link: InverseLink = softmax,
    chosen: Tensor | None = None,
) -> Tensor:
    """Predictive probabilities [..., C] from Gaussian outputs.

    Args:
        mean: μ [..., C].
        covariance: Σ [..., C, C], or variances [..., C] where the link needs no more; K in place of
            C where outputs are chosen.
        link: the approximation; the bridges are for softmax only.
        n_samples: points (draws) for ``mc``; None for as many as are accurate.
        generator: source of random draws for ``mc``, in place of its fixed points.
        inverse_link: softmax, or sigmoid.
        chosen: which outputs the covariance is of [..., K], for softmax only; None for all.
    """
    if chosen is not None:
        return _of_chosen(ChosenMoments(mean, covariance, chosen), link, n_samples, generator)
    match link:
        case LinkApprox.PROBIT:
            variance = (
                covariance
                if covariance.shape == mean.shape
                else covariance.diagonal(dim1=-2, dim2=-1)
            )
            return probit(mean, variance, inverse_link)
        case LinkApprox.MC:
            return monte_carlo(mean, covariance, n_samples, generator, inverse_link)
        case LinkApprox.BRIDGE:
            return laplace_bridge(mean, covariance)
        case LinkApprox.BRIDGE_NORM:
            return laplace_bridge(mean, covariance, normalise=True)
    raise ValueError(f"unknown link approximation {link!r}.")


def informed_probabilities(
    mean: Tensor,
    covariance: Tensor,
    link: LinkApprox,
    inverse_link: InverseLink = softmax,
    chosen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`class_probabilities`, and the mutual information of label and outputs [...], in nats.

    The information is over the points of "mc" whatever the link, summed over binary labels.
    """
    probabilities = class_probabilities(mean, covariance, link, None, None, inverse_link, chosen)
    if chosen is None:
        return probabilities, mutual_information(mean, covariance, inverse_link)
    return probabilities, ChosenMoments(mean, covariance, chosen).mutual_information()


def _of_chosen(
    moments: ChosenMoments,
    link: LinkApprox,
    n_samples: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    match link:
        case LinkApprox.PROBIT:
            return moments.probit()
        case LinkApprox.MC:
            return moments.monte_carlo(n_samples, generator)
        case LinkApprox.BRIDGE:
            return moments.bridge()
        case LinkApprox.BRIDGE_NORM:
            return moments.bridge(normalise=True)
    raise ValueError(f"unknown link approximation {link!r}.")
