"""A predictor under a prior: moments of the outputs, probabilities and draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor

from laplace_debiased.likelihoods import InverseLink, mutual_information
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.predictive.predictor import OutputCovariance, Predictor
from laplace_debiased.predictive.probabilities import class_probabilities, needs_covariance


@dataclass(frozen=True, eq=False)
class Predictive:
    """What a fitted curvature predicts under a prior.

    Attributes:
        predictor: the fitted curvature.
        precision: the posterior precision, as the predictor prepares it.
        inverse_link: from outputs to probabilities.
        device: the network's.
        differentiable: keep the graph, for gradients with respect to the inputs.
    """

    predictor: Predictor
    precision: Any
    inverse_link: InverseLink
    device: torch.device
    differentiable: bool = False

    def moments(self, inputs: Any, covariance: OutputCovariance) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the linearised outputs, as ``Predictor.moments``."""
        with exact_arithmetic(self.device):
            return self.predictor.moments(
                inputs, self.precision, covariance, differentiable=self.differentiable
            )

    def host_moments(
        self, inputs: Any, *, joint: bool, diagonal_output: bool
    ) -> tuple[Tensor, Tensor]:
        """The same in laplace-torch's shapes: with ``joint`` the mean [m·C] is flat."""
        if joint:
            mean, covariance = self.moments(inputs, OutputCovariance.JOINT)
            return mean.flatten(), covariance
        kind = OutputCovariance.DIAGONAL if diagonal_output else OutputCovariance.PER_SAMPLE
        return self.moments(inputs, kind)

    def probabilities(
        self,
        inputs: Any,
        link: LinkApprox,
        n_samples: int | None,
        *,
        diagonal_output: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Predictive probabilities [m, C] ([m, T, C] for outputs at T positions).

        Args:
            inputs: one batch of model inputs, m samples.
            link: how the inverse link is averaged over the outputs' distribution.
            n_samples: points or draws for "mc"; None for as many as are accurate.
            diagonal_output: independent outputs for "mc".
            generator: source of random draws.
        """
        diagonal = not needs_covariance(link, diagonal_output, self.inverse_link)
        kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
        mean, covariance = self.moments(inputs, kind)
        return class_probabilities(mean, covariance, link, n_samples, generator, self.inverse_link)

    def informed_probabilities(self, inputs: Any, link: LinkApprox) -> tuple[Tensor, Tensor]:
        """:meth:`probabilities`, and the mutual information of label and weights, in nats.

        Args:
            inputs: one batch of model inputs, m samples.
            link: of the probabilities; the information is always over the points of "mc".
        """
        binary = self.inverse_link is torch.sigmoid
        kind = OutputCovariance.DIAGONAL if binary else OutputCovariance.PER_SAMPLE
        mean, covariance = self.moments(inputs, kind)
        probabilities = class_probabilities(mean, covariance, link, None, None, self.inverse_link)
        return probabilities, mutual_information(mean, covariance, self.inverse_link)
