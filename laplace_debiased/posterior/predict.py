"""From output moments or weight samples to predictions: the calls of ``la(x)``, as functions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor, nn

from laplace_debiased.curvature.guards import call_with, evaluation_mode, to_device
from laplace_debiased.data.inputs import call_arguments, explained_failure, logits_of
from laplace_debiased.likelihoods import (
    InverseLink,
    laplace_bridge,
    monte_carlo,
    probit,
    softmax,
)


def needs_covariance(link: LinkApprox, diagonal_output: bool) -> bool:
    """Whether a link approximation reads more than the output variances."""
    match link:
        case LinkApprox.PROBIT:
            return False
        case LinkApprox.MC:
            return not diagonal_output
        case LinkApprox.BRIDGE | LinkApprox.BRIDGE_NORM:
            return True
    raise ValueError(f"unknown link approximation {link!r}.")


def class_probabilities(
    mean: Tensor,
    covariance: Tensor,
    link: LinkApprox,
    n_samples: int,
    generator: torch.Generator | None = None,
    inverse_link: InverseLink = softmax,
) -> Tensor:
    """Predictive probabilities [..., C] from Gaussian outputs.

    Args:
        mean: μ [..., C].
        covariance: Σ [..., C, C], or variances [..., C] where the link needs no more.
        link: the approximation; the bridges are for softmax only.
        n_samples: draws for ``mc``.
        generator: source of these draws.
        inverse_link: softmax, or sigmoid.
    """
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


def network_samples(
    model: nn.Module,
    parameters: list[tuple[str, Tensor]],
    weight_samples: Tensor,
    inputs: Any,
    *,
    differentiable: bool,
    **model_kwargs: Any,
) -> Iterator[Tensor]:
    """Outputs of the network at each weight sample; its own weights are never written.

    Args:
        model: the network.
        parameters: name and current value of every covered parameter, in order.
        weight_samples: [S, P] samples of these, flattened and concatenated.
        inputs: one batch of model inputs.
        differentiable: keep the graph with respect to ``inputs``.
        model_kwargs: further arguments of the model.
    """
    device = parameters[0][1].device
    inputs = to_device(inputs, device)
    sizes = [value.numel() for _, value in parameters]
    for sample in weight_samples:
        values = {
            name: part.reshape(value.shape).to(value.dtype)
            for (name, value), part in zip(parameters, sample.split(sizes), strict=True)
        }
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(differentiable),
            evaluation_mode(model),
            explained_failure(inputs),
        ):
            args, named = call_arguments(model, inputs)
            outputs = logits_of(call_with(model, values, args, {**named, **model_kwargs}))
        yield outputs
