"""What is tuned: a fitted predictor without a prior, and how its predictions are scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from laplace_debiased.likelihoods import InverseLink, LikelihoodName, LossModel, softmax
from laplace_debiased.predictive import Predictor
from laplace_debiased.predictive.selection import OutputSelection

_COPIES = 6
"""How often moments at all priors are held: parts and whole, scaled by priors, as roots."""


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
        n_outputs: C.
        byte_budget: what moments of a whole grid may take at a time.
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
    selection: OutputSelection
    n_outputs: int
    byte_budget: int

    @property
    def inverse_link(self) -> InverseLink:
        """From outputs to probabilities."""
        return torch.sigmoid if self.likelihood == LikelihoodName.BERNOULLI else softmax

    def samples_at_a_time(self, n_nodes: int, targets: Tensor, *, diagonal: bool) -> int:
        """Of how many samples the moments under every prior precision fit the byte budget.

        Args:
            n_nodes: prior precisions.
            targets: of a batch; class labels [m, T] say how many positions a sample has.
            diagonal: variances only.
        """
        width = min(self.selection.n_outputs or self.n_outputs, self.n_outputs)
        positions = 1
        if self.likelihood == LikelihoodName.CLASSIFICATION and not self.selection.last_position:
            positions = targets.shape[1] if targets.ndim == 2 else 1
        each = (n_nodes + 1) * positions * width * (1 if diagonal else width)
        size = torch.finfo(self.dtype).bits // 8
        return max(1, self.byte_budget // max(1, _COPIES * each * size))
