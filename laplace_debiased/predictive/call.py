"""What a call of a posterior asks for: checked, and answered from moments or sampled networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from laplace.utils.enums import LinkApprox, PredType
from torch import Tensor

from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods import InverseLink, LikelihoodName, softmax
from laplace_debiased.options import Positions, parse_choice
from laplace_debiased.predictive.predictive import Predictive

MOMENTS = (LikelihoodName.REGRESSION, LikelihoodName.REWARD_MODELING)
"""Likelihoods whose predictions are moments of the outputs."""

NETWORKS = 100
"""Sampled networks that a prediction averages by default."""

SampledOutputs = Callable[..., Tensor]
"""(inputs, n_samples, generator, **model_kwargs) to outputs of sampled networks [S, m, C]."""


@dataclass(frozen=True, eq=False)
class PredictionCall:
    """What a call of a posterior asks for.

    Attributes:
        pred_type: the linearised network, or sampled networks.
        link: how probabilities are approximated.
        likelihood: of the posterior.
        joint: covariance over all samples.
        n_samples: draws or points; None for what the kind of prediction takes by itself.
        diagonal_output: variances in place of covariances.
        generator: source of the draws.
        fitting: reward modelling: probabilities of a pair in place of rewards.
    """

    pred_type: PredType
    link: LinkApprox
    likelihood: str
    joint: bool = False
    n_samples: int | None = None
    diagonal_output: bool = False
    generator: torch.Generator | None = None
    fitting: bool = False

    @property
    def asks_for_moments(self) -> bool:
        """Whether the answer is a mean and a covariance."""
        rewards = self.likelihood == LikelihoodName.REWARD_MODELING
        return self.likelihood in MOMENTS and not (self.fitting and rewards)

    def answer(
        self,
        inputs: Any,
        predictive: Predictive,
        sampled: SampledOutputs,
        model_kwargs: dict[str, Any],
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction.

        Args:
            inputs: model inputs.
            predictive: the linearised network under the posterior.
            sampled: outputs of sampled networks.
            model_kwargs: further arguments of the sampled networks.

        Raises:
            ValueError: for a combination without an answer.
        """
        if self.pred_type is PredType.GLM:
            if model_kwargs:
                raise TypeError(
                    f"a prediction takes no argument {next(iter(model_kwargs))!r}; further "
                    "arguments of the model are for pred_type='nn' only."
                )
            if self.asks_for_moments:
                return predictive.host_moments(
                    inputs, joint=self.joint, diagonal_output=self.diagonal_output
                )
            return predictive.probabilities(
                inputs,
                self.link,
                self.n_samples,
                diagonal_output=self.diagonal_output,
                generator=self.generator,
            )
        n_samples = NETWORKS if self.n_samples is None else self.n_samples
        if self.asks_for_moments and n_samples == 1:
            raise ValueError("the variance of sampled networks needs n_samples of at least 2.")
        samples = sampled(inputs, n_samples, self.generator, **model_kwargs)
        if self.asks_for_moments:
            return samples.mean(0), samples.var(0)
        return predictive.inverse_link(samples).mean(0)


def require_finite_outputs(outputs: Tensor) -> None:
    """Check the outputs of sampled networks [S, m, ...].

    Raises:
        NumericalError: naming the first sample of the batch with NaN or infinity.
    """
    finite = torch.isfinite(outputs.detach()).movedim(1, 0).flatten(1).all(-1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise NumericalError(
            f"outputs of sampled networks are NaN or infinite (first at sample {bad} of the "
            "batch). Check the inputs for NaN; a larger prior_precision keeps sampled weights "
            "closer to the trained ones."
        )


def require_finite(prediction: Tensor) -> None:
    """Check a prediction [m, ...].

    Raises:
        NumericalError: naming the first row with NaN or infinity.
    """
    finite = (
        torch.isfinite(prediction.detach()).flatten(1).all(-1)
        if prediction.ndim > 1
        else (torch.isfinite(prediction.detach()))
    )
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise NumericalError(
            f"the prediction is NaN or infinite (first at sample {bad} of the batch): variances "
            "overflow. Raise prior_precision, scale the inputs, or use a model in torch.float64."
        )


def checked_pred_type(pred_type: PredType | str) -> PredType:
    """The kind of prediction.

    Raises:
        ValueError: if it is neither "glm" nor "nn".
    """
    pred = parse_choice(PredType, pred_type, "pred_type")
    if pred not in (PredType.GLM, PredType.NN):
        raise ValueError("pred_type must be 'glm' or 'nn'.")
    return pred


def checked_link(link_approx: LinkApprox | str, likelihood: str) -> LinkApprox:
    """The link approximation.

    Raises:
        ValueError: if it is unknown, or does not fit the likelihood.
    """
    link = parse_choice(LinkApprox, link_approx, "link_approx")
    bridges = (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM)
    if link in bridges and likelihood == LikelihoodName.BERNOULLI:
        raise ValueError(
            f"link_approx={link.value!r} is for classes that exclude each other; with "
            "likelihood='bernoulli' use 'probit' or 'mc'."
        )
    return link


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Check that a generator can draw for the model.

    Raises:
        ValueError: if it is something else, or on another device.
    """
    if generator is None:
        return
    if not isinstance(generator, torch.Generator) or generator.device.type != device.type:
        raise ValueError(f"generator must be a torch.Generator on the model's device {device}.")


def checked_positions(positions: Positions | str, pred: PredType) -> Positions:
    """At which positions a prediction is.

    Raises:
        ValueError: for an unknown choice, or "last" of sampled networks.
    """
    chosen = parse_choice(Positions, positions, "positions")
    if chosen is Positions.LAST and pred is not PredType.GLM:
        raise ValueError(
            "positions='last' is for pred_type='glm'; of sampled networks take the position that "
            "you need from the result."
        )
    return chosen


def inverse_link_of(likelihood: str) -> InverseLink:
    """From outputs to probabilities."""
    return torch.sigmoid if likelihood == LikelihoodName.BERNOULLI else softmax
