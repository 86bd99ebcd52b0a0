"""What a call of a posterior asks for, checked."""

from __future__ import annotations

import torch
from laplace.utils.enums import LinkApprox, PredType
from torch import Tensor

from laplace_debiased.errors import NumericalError
from laplace_debiased.likelihoods import InverseLink, LikelihoodName, softmax
from laplace_debiased.options import Positions, parse_choice

MOMENTS = (LikelihoodName.REGRESSION, LikelihoodName.REWARD_MODELING)
"""Likelihoods whose predictions are moments of the outputs."""

NETWORKS = 100
"""Sampled networks that a prediction averages by default."""


def require_finite(values: Tensor, *, sampled: bool = False) -> None:
    """Refuse a prediction [m, ...], or outputs of ``sampled`` networks [S, m, ...], with NaN."""
    finite = torch.isfinite(values.detach())
    finite = (finite.movedim(1, 0) if sampled else finite).unsqueeze(-1).flatten(1).all(-1)
    if not bool(finite.all()):
        what = "outputs of sampled networks are" if sampled else "the prediction is"
        advice = (
            ". Check the inputs for NaN; a larger prior_precision keeps sampled weights closer to "
            "the trained ones."
            if sampled
            else ": variances overflow. Raise prior_precision, scale the inputs, or use a model in "
            "torch.float64."
        )
        first = int((~finite).nonzero()[0])
        raise NumericalError(
            f"{what} NaN or infinite (first at sample {first} of the batch){advice}"
        )


def checked_pred_type(pred_type: PredType | str) -> PredType:
    """The kind of prediction, "glm" or "nn"."""
    pred = parse_choice(PredType, pred_type, "pred_type")
    if pred not in (PredType.GLM, PredType.NN):
        raise ValueError("pred_type must be 'glm' or 'nn'.")
    return pred


def checked_link(link_approx: LinkApprox | str, likelihood: str) -> LinkApprox:
    """The link approximation, which has to fit the likelihood."""
    link = parse_choice(LinkApprox, link_approx, "link_approx")
    bridges = (LinkApprox.BRIDGE, LinkApprox.BRIDGE_NORM)
    if link in bridges and likelihood == LikelihoodName.BERNOULLI:
        raise ValueError(
            f"link_approx={link.value!r} is for classes that exclude each other; with "
            "likelihood='bernoulli' use 'probit' or 'mc'."
        )
    return link


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Refuse what is no generator, or on another device than the model."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator) or generator.device.type != device.type:
        raise ValueError(f"generator must be a torch.Generator on the model's device {device}.")


def checked_positions(positions: Positions | str, pred: PredType) -> Positions:
    """At which positions a prediction is; "last" is for the linearised network."""
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
