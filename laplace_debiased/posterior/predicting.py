"""Predictions of a fitted posterior: the calls of ``la(x)``, checked and answered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from laplace.utils.enums import LinkApprox, PredType
from torch import Tensor

from laplace_debiased.checks import checked_flag, checked_integer
from laplace_debiased.curvature import Coverage
from laplace_debiased.errors import NumericalError
from laplace_debiased.estimation import Arguments, Fit, Target
from laplace_debiased.likelihoods import InverseLink, LikelihoodName, softmax
from laplace_debiased.network.inputs import check_model_arguments
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import undrawn_on_failure
from laplace_debiased.options import Positions, parse_choice
from laplace_debiased.predictive import (
    OutputSelection,
    OutputsReport,
    Predictive,
    Predictor,
    outputs_report,
    resolved,
)

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Any]
"""What a model takes: a tensor, several, or a mapping that holds tensors."""

MOMENTS = (LikelihoodName.REGRESSION, LikelihoodName.REWARD_MODELING)
"""Likelihoods whose predictions are moments of the outputs."""

NETWORKS = 100
"""Sampled networks that a prediction averages by default."""

SampledOutputs = Callable[..., Tensor]
"""(inputs, n_samples, generator, **model_kwargs) to outputs of sampled networks [S, m, C]."""


class Fitted(Protocol):
    """What predictions read of a posterior."""

    likelihood: str
    enable_backprop: bool
    tuned_link_approx: LinkApprox | None
    mean: Tensor
    _target: Target
    _arguments: Arguments
    _warned_about_link: bool

    @property
    def coverage(self) -> Coverage:
        """Which parameters carry a posterior."""

    @property
    def fitted(self) -> Fit:
        """The fitted curvature."""

    @property
    def predictor(self) -> Predictor:
        """What predicts with the fitted curvature."""

    @property
    def _device(self) -> torch.device: ...
    def sample(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        """Weight samples [n_samples, P]."""

    def _precision(self, *, differentiable: bool) -> Any: ...
    def _check_H_init(self) -> None: ...  # noqa: N802
    def _check_model(self) -> None: ...


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
        n_samples = checked_integer("n_samples", n_samples)
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


@public_call
def predict(
    self: Fitted,
    x: Inputs,
    pred_type: PredType | str = PredType.GLM,
    joint: bool = False,
    link_approx: LinkApprox | str | None = None,
    n_samples: int | None = None,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    fitting: bool = False,
    *,
    positions: Positions | str = Positions.ALL,
    **model_kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Posterior predictive on ``x``.

    Where the model has more classes than the option ``n_outputs`` says (by default: more than 64),
    covariances are computed of the most probable ones of each sample, and the probabilities of all
    follow from these: see ``outputs_report`` for what that leaves out.

    Args:
        self: a fitted posterior.
        x: model inputs, m samples.
        pred_type: "glm", the linearised network, or "nn", sampled networks.
        joint: regression with "glm": covariance over all samples [m·C, m·C].
        link_approx: "probit", "mc", "bridge" or "bridge_norm". By default the one that the
            prior precision was tuned with, else "mc".
        n_samples: networks for "nn" (100 by default); fixed quasi-random points for "mc" (by
            default as many as are accurate: 256, more for very uncertain outputs).
        diagonal_output: regression: variances in place of covariances; "mc": independent
            outputs.
        generator: source of all draws. Without one, "nn" draws from torch's global generator and
            "mc" is deterministic.
        fitting: reward modelling: probabilities of a pair, as while fitting, in place of
            rewards.
        positions: of a sequence "all", or "last": only the last position is computed (the last
            that an ``attention_mask`` attends to), as generation needs it.
        model_kwargs: further arguments of the model, for "nn".

    Returns:
        Classification: probabilities [m, C] ([m, T, C] for outputs at T positions; [m, C] at the
        last). Bernoulli:
        the probability of every label [m, C]. Regression and rewards: the mean [m, C] and the
        *epistemic* covariance [m, C, C], [m, C] with ``diagonal_output`` or "nn"; with
        ``joint`` the mean [m·C] and covariance [m·C, m·C].

    Raises:
        NotFittedError: before ``fit``.
        ModelChangedError: if the model's weights or running statistics are no longer those of
            the fit.
        ValueError: for an unknown or impossible combination.
    """
    self._check_H_init()
    pred = checked_pred_type(pred_type)
    for name, flag in (
        ("joint", joint),
        ("diagonal_output", diagonal_output),
        ("fitting", fitting),
    ):
        checked_flag(name, flag)
    call = PredictionCall(
        pred,
        _link(self, link_approx, pred),
        self.likelihood,
        joint,
        n_samples,
        diagonal_output,
        generator,
        fitting,
    )
    check_generator(generator, self._device)
    at = checked_positions(positions, pred)
    answer = call.answer(x, linearised(self, at), partial(sampled_outputs, self), model_kwargs)
    for part in answer if isinstance(answer, tuple) else (answer,):
        require_finite(part)
    return answer


@public_call
def informed_probabilities(
    self: Fitted,
    x: Inputs,
    link_approx: LinkApprox | str | None = None,
    *,
    positions: Positions | str = Positions.ALL,
) -> tuple[Tensor, Tensor]:
    """Probabilities as of ``la(x)``, and the mutual information of label and weights, in nats.

    Both are of the same moments. The information is [m] ([m, T] for outputs at T positions), summed
    over binary labels.
    """
    self._check_H_init()
    link = _link(self, link_approx, PredType.GLM)
    at = checked_positions(positions, PredType.GLM)
    return linearised(self, at).informed_probabilities(x, link)


def linearised(self: Fitted, positions: Positions = Positions.ALL) -> Predictive:
    """The linearised network under the present hyper-parameters."""
    self._check_H_init()
    self._check_model()
    precision = self._precision(differentiable=self.enable_backprop)
    link = inverse_link_of(self.likelihood)
    return Predictive(
        self.predictor,
        precision,
        link,
        self._device,
        self.enable_backprop,
        selection_of(self._arguments, self.fitted, positions),
    )


def selection_of(
    arguments: Arguments, fit: Fit, positions: Positions = Positions.ALL
) -> OutputSelection:
    """Which outputs a posterior's probabilities need moments of."""
    chosen = None
    if arguments.likelihood == LikelihoodName.CLASSIFICATION:
        chosen = resolved(arguments.n_outputs, fit.n_outputs)
    return OutputSelection(chosen, positions is Positions.LAST)


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


@public_call
def report_outputs(
    self: Fitted,
    x: Inputs,
    link_approx: LinkApprox | str | None = None,
    *,
    positions: Positions | str = Positions.ALL,
) -> OutputsReport:
    """What ``n_outputs`` leaves out on some samples: probability beyond, and change from K to 2K.

    Args:
        self: a fitted posterior.
        x: model inputs of a few samples.
        link_approx: as in ``__call__``.
        positions: as in ``__call__``.

    Raises:
        NotFittedError: before ``fit``.
        ValueError: unless the likelihood is "classification".
    """
    if self.likelihood != LikelihoodName.CLASSIFICATION:
        raise ValueError(
            "outputs_report is about the most probable classes; it is for "
            f"likelihood='classification', not {self.likelihood!r}."
        )
    self._check_H_init()
    link = _link(self, link_approx, PredType.GLM)
    at = checked_positions(positions, PredType.GLM)
    return outputs_report(linearised(self, at), x, link)


@public_call
def host_moments(
    self: Fitted, X: Inputs, joint: bool = False, diagonal_output: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the linearised outputs, as laplace-torch's method of the name."""
    return linearised(self).host_moments(X, joint=joint, diagonal_output=diagonal_output)


def sampled_outputs(
    self: Fitted,
    inputs: Inputs,
    n_samples: int,
    generator: torch.Generator | None,
    **model_kwargs: Any,
) -> Tensor:
    """Outputs [n_samples, m, C] of networks at sampled weights; a failure draws no numbers."""
    self._check_model()
    check_model_arguments(self._target.model, model_kwargs)
    with exact_arithmetic(self._device), undrawn_on_failure(generator, self._device):
        outputs = self._target.sampled_outputs(
            self.coverage,
            self.sample(n_samples, generator),
            inputs,
            differentiable=self.enable_backprop,
            **model_kwargs,
        )
        require_finite_outputs(outputs)
    return outputs


def inverse_link_of(likelihood: str) -> InverseLink:
    """From outputs to probabilities."""
    return torch.sigmoid if likelihood == LikelihoodName.BERNOULLI else softmax


def _link(self: Fitted, link_approx: LinkApprox | str | None, pred: PredType) -> LinkApprox:
    if link_approx is None:
        tuned = self.tuned_link_approx if pred is PredType.GLM else None
        return tuned or LinkApprox.MC
    link = checked_link(link_approx, self.likelihood)
    if pred is PredType.NN and link is not LinkApprox.MC:
        raise ValueError("pred_type='nn' averages sampled networks: use link_approx='mc'.")
    tuned = self.tuned_link_approx
    if pred is PredType.GLM and tuned not in (None, link) and not self._warned_about_link:
        self._warned_about_link = True
        warnings.warn(
            f"the prior precision was tuned for link_approx={tuned.value!r}, but this "
            f"prediction uses {link.value!r}.",
            UserWarning,
            stacklevel=5,
        )
    return link
