"""What is tuned: a fitted predictor without a prior, and how its predictions are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laplace_debiased.likelihoods import InverseLink, LikelihoodName, LossModel, softmax
from laplace_debiased.predictive import Predictor
from laplace_debiased.predictive.selection import ALL_OUTPUTS, OutputSelection


@dataclass(frozen=True, eq=False)
class Subject:
    """A fitted predictor, and what its losses depend on beside the prior.

    Attributes:
        predictor: the fitted curvature.
        likelihood: a :class:`LikelihoodName`'s value.
        loss: the loss model.
        h: likelihood factor 1/(σ²·temperature).
        noise_variance: σ².
        device: the network's.
        dtype: of the posterior.
        label_key: key of the labels in mapping batches.
        network: the network, for the MAP model's loss beside sampled networks'.
        sampled: (prior precision, inputs, n_samples, generator) to the prediction of sampled
            networks.
        selection: of which outputs predictions need moments.
    """

    predictor: Predictor
    likelihood: str
    loss: LossModel
    h: Tensor
    noise_variance: float
    device: torch.device
    dtype: torch.dtype
    label_key: str
    network: nn.Module
    sampled: Callable[..., Tensor | tuple[Tensor, Tensor]]
    selection: OutputSelection = ALL_OUTPUTS

    @property
    def inverse_link(self) -> InverseLink:
        """From outputs to probabilities."""
        return torch.sigmoid if self.likelihood == LikelihoodName.BERNOULLI else softmax
