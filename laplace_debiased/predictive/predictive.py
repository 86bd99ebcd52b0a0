"""A predictor under a prior: moments of the outputs, probabilities and draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from laplace.utils.enums import LinkApprox
from torch import Tensor

from laplace_debiased.likelihoods import InverseLink
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.predictive.predictor import OutputCovariance, OutputMoments, Predictor
from laplace_debiased.predictive.probabilities import (
    class_probabilities,
    informed_probabilities,
    needs_covariance,
)
from laplace_debiased.predictive.selection import ALL_OUTPUTS, OutputSelection


@dataclass(frozen=True, eq=False)
class Predictive:
    """What a fitted curvature predicts under a prior.

    Attributes:
        predictor: the fitted curvature.
        precision: the posterior precision, as the predictor prepares it.
        inverse_link: from outputs to probabilities.
        device: the network's.
        differentiable: keep the graph, for gradients with respect to the inputs.
        selection: of which outputs probabilities need moments.
    """

    predictor: Predictor
    precision: Any
    inverse_link: InverseLink
    device: torch.device
    differentiable: bool = False
    selection: OutputSelection = ALL_OUTPUTS

    def moments(
        self, inputs: Any, covariance: OutputCovariance, selection: OutputSelection = ALL_OUTPUTS
    ) -> OutputMoments:
        """Mean and covariance of the linearised outputs, as ``Predictor.moments``."""
        with exact_arithmetic(self.device):
            return self.predictor.moments(
                inputs, self.precision, covariance, selection, differentiable=self.differentiable
            )

    def host_moments(
        self, inputs: Any, *, joint: bool, diagonal_output: bool
    ) -> tuple[Tensor, Tensor]:
        """The same in laplace-torch's shapes: with ``joint`` the mean [m·C] is flat."""
        if joint:
            found = self.moments(inputs, OutputCovariance.JOINT)
            return found.mean.flatten(), found.covariance
        kind = OutputCovariance.DIAGONAL if diagonal_output else OutputCovariance.PER_SAMPLE
        found = self.moments(inputs, kind)
        return found.mean, found.covariance

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
        found = self.moments(inputs, kind, self.selection)
        return class_probabilities(
            found.mean,
            found.covariance,
            link,
            n_samples,
            generator,
            self.inverse_link,
            found.chosen,
        )

    def informed_probabilities(self, inputs: Any, link: LinkApprox) -> tuple[Tensor, Tensor]:
        """:meth:`probabilities`, and the mutual information of label and weights, in nats.

        Args:
            inputs: one batch of model inputs, m samples.
            link: of the probabilities; the information is always over the points of "mc".
        """
        inverse = self.inverse_link
        binary = inverse is torch.sigmoid
        kind = OutputCovariance.DIAGONAL if binary else OutputCovariance.PER_SAMPLE
        found = self.moments(inputs, kind, self.selection)
        return informed_probabilities(found.mean, found.covariance, link, inverse, found.chosen)
