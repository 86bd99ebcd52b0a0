"""A fitted curvature under a prior: from moments of the outputs to probabilities."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

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
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.predictive.call import require_finite
from laplace_debiased.predictive.predictor import OutputCovariance, OutputMoments, Predictor
from laplace_debiased.predictive.selection import ALL_OUTPUTS, OutputSelection


def needs_covariance(
    link: LinkApprox, diagonal_output: bool, inverse_link: InverseLink = softmax
) -> bool:
    """Whether a link approximation reads more than the output variances.

    The probability of one binary label depends on its own logit only.
    """
    if link is LinkApprox.MC:
        return not diagonal_output and inverse_link is not torch.sigmoid
    return link is not LinkApprox.PROBIT


_RESOLVED = 1e-3
"""Largest rounding error of a covariance, relative to what a softmax sees of it."""


def rounding(covariances: Tensor) -> Tensor:
    """What rounding hides of covariances [K, m, C, C], and what they tell: sums over m [2, K].

    No data say anything about a shift of all outputs: under a very small prior precision its
    variance, which no probability depends on, exceeds the rest by more than the dtype resolves.
    """
    diagonals = covariances.diagonal(dim1=-2, dim2=-1)
    rest = (diagonals.mean(-1) - covariances.mean((-2, -1))).sum(-1)
    resolution = torch.finfo(covariances.dtype).eps * diagonals.amax(-1).sum(-1)
    return torch.stack([resolution, rest]).double().cpu()


def rounded_away(sums: Tensor) -> Tensor:
    """At which nodes [K] rounding hides what classes do not share, from :func:`rounding`."""
    return sums[0] > _RESOLVED * sums[1]


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
    normalise = link is LinkApprox.BRIDGE_NORM
    if chosen is not None:
        some = ChosenMoments(mean, covariance, chosen)
        match link:
            case LinkApprox.PROBIT:
                return some.probit()
            case LinkApprox.MC:
                return some.monte_carlo(n_samples, generator)
            case LinkApprox.BRIDGE | LinkApprox.BRIDGE_NORM:
                return some.bridge(normalise=normalise)
    match link:
        case LinkApprox.PROBIT:
            return probit(
                mean,
                covariance
                if covariance.shape == mean.shape
                else covariance.diagonal(dim1=-2, dim2=-1),
                inverse_link,
            )
        case LinkApprox.MC:
            return monte_carlo(mean, covariance, n_samples, generator, inverse_link)
        case LinkApprox.BRIDGE | LinkApprox.BRIDGE_NORM:
            return laplace_bridge(mean, covariance, normalise=normalise)
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

    def _usable(self, found: OutputMoments) -> OutputMoments:
        """Moments that probabilities can be made of.

        Raises:
            NumericalError: if a covariance is not finite, which links would take for something.
        """
        covariance = found.covariance.detach()
        require_finite(covariance)
        matrices = covariance.ndim > found.mean.ndim
        if matrices and self.inverse_link is not torch.sigmoid and covariance.shape[-1] > 1:
            sums = rounding(covariance.reshape(1, -1, *covariance.shape[-2:]))
            if bool(rounded_away(sums).any()):
                warnings.warn(
                    f"under so small a prior precision {covariance.dtype} rounds away what the "
                    "variances of the classes do not share, so that probabilities are close to "
                    "the trained model's: raise prior_precision, or use a model in torch.float64.",
                    UserWarning,
                    stacklevel=6,
                )
        return found

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

        Arguments as in :func:`class_probabilities`; ``diagonal_output``: independent outputs for
        "mc".
        """
        diagonal = not needs_covariance(link, diagonal_output, self.inverse_link)
        kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
        found = self._usable(self.moments(inputs, kind, self.selection))
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
        """:meth:`probabilities`, and the mutual information of label and weights, in nats."""
        inverse = self.inverse_link
        binary = inverse is torch.sigmoid
        kind = OutputCovariance.DIAGONAL if binary else OutputCovariance.PER_SAMPLE
        found = self._usable(self.moments(inputs, kind, self.selection))
        return informed_probabilities(found.mean, found.covariance, link, inverse, found.chosen)


@dataclass(frozen=True)
class OutputsReport:
    """How much depends on the number K of outputs whose moments are computed.

    Attributes:
        n_outputs: K.
        n_classes: C.
        n_samples: samples (or positions) that were looked at.
        mass_outside: mean predictive probability of all classes beyond the K.
        max_mass_outside: the largest of any sample.
        change: mean Kullback-Leibler divergence of the prediction from K outputs to that from 2K,
            in nats; 0 where K is C.
        max_change: the largest of any sample.
    """

    n_outputs: int
    n_classes: int
    n_samples: int
    mass_outside: float
    max_mass_outside: float
    change: float
    max_change: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.n_outputs} of {self.n_classes} outputs, {self.n_samples} samples: probability "
            f"outside {self.mass_outside:.3g} (at most {self.max_mass_outside:.3g}); "
            f"{2 * self.n_outputs} outputs change predictions by {1e3 * self.change:.3g}e-3 nats "
            f"(at most {1e3 * self.max_change:.3g}e-3)"
        )


def outputs_report(
    predictive: Predictive, inputs: Any, link: LinkApprox, n_points: int | None = None
) -> OutputsReport:
    """Compare predictions of a few samples from K and from 2K outputs, at ``n_points`` of "mc"."""

    def probabilities(n_outputs: int | None) -> Tensor:
        selected = replace(predictive.selection, n_outputs=n_outputs)
        chosen = replace(predictive, selection=selected, differentiable=False)
        p = chosen.probabilities(inputs, link, n_points, diagonal_output=False, generator=None)
        return p.detach().double().flatten(0, -2)

    k = predictive.selection.n_outputs
    p = probabilities(k)
    n_samples, n_classes = p.shape
    if k is None or k >= n_classes:
        return OutputsReport(n_classes, n_classes, n_samples, 0.0, 0.0, 0.0, 0.0)
    outside = 1.0 - p.topk(k, dim=-1).values.sum(-1)
    q = probabilities(2 * k)
    tiny = torch.finfo(torch.float64).tiny
    # Sums of p log(p/q) − p + q: no term is negative, so that small ones do not cancel.
    ratio = (p.clamp_min(tiny) / q.clamp_min(tiny)).log()
    divergence = (p * ratio - p + q).sum(-1).clamp_min(0.0)
    return OutputsReport(
        k,
        n_classes,
        n_samples,
        *(float(v) for values in (outside, divergence) for v in (values.mean(), values.max())),
    )
