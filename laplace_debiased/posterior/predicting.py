"""Predictions of a fitted posterior: the calls of ``la(x)``, and draws of functions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from laplace.utils.enums import LinkApprox, PredType
from torch import Tensor

from laplace_debiased.checks import checked_flag, checked_integer
from laplace_debiased.estimation.arguments import Arguments
from laplace_debiased.estimation.structure import Fit
from laplace_debiased.likelihoods import LikelihoodName, gaussian_samples
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import batch_length, check_model_arguments
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.precision import exact_arithmetic, in_precision_of
from laplace_debiased.network.rng import undrawn_on_failure
from laplace_debiased.options import Positions
from laplace_debiased.posterior.shell import Shell
from laplace_debiased.predictive import (
    OutputSelection,
    OutputsReport,
    Predictive,
    outputs_report,
    resolved,
)
from laplace_debiased.predictive.call import (
    MOMENTS,
    NETWORKS,
    check_generator,
    checked_link,
    checked_positions,
    checked_pred_type,
    inverse_link_of,
    require_finite,
)

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Any]
"""What a model takes: a tensor, several, or a mapping that holds tensors."""


@public_call
def predict(
    self: Shell,
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
        ``joint`` the mean [m·C] and covariance [m·C, m·C]. All are computed in float32 or better,
        and come in float16 or bfloat16 where the model is in that.

    Raises:
        NotFittedError: before ``fit``.
        ModelChangedError: if the model's weights or running statistics are no longer those of
            the fit.
        ValueError: for an unknown or impossible combination.
    """
    self._check_H_init()
    pred = checked_pred_type(pred_type)
    flags = {"joint": joint, "diagonal_output": diagonal_output, "fitting": fitting}
    for name, flag in flags.items():
        checked_flag(name, flag)
    if n_samples is not None:
        n_samples = checked_integer("n_samples", n_samples)
    link = _link(self, link_approx, pred)
    check_generator(generator, self._device)
    at, x = checked_positions(positions, pred), _taken(self, x)
    rewards = self.likelihood == LikelihoodName.REWARD_MODELING
    moments = self.likelihood in MOMENTS and not (fitting and rewards)
    # Also what follows the draws may fail, and must then not have drawn.
    with undrawn_on_failure(generator, self._device):
        predictive = linearised(self, at)
        answer: Tensor | tuple[Tensor, Tensor]
        if pred is PredType.NN:
            answer = _of_networks(self, x, n_samples, generator, moments, model_kwargs)
        elif model_kwargs:
            raise TypeError(
                f"a prediction takes no argument {next(iter(model_kwargs))!r}; further "
                "arguments of the model are for pred_type='nn' only."
            )
        elif moments:
            answer = predictive.host_moments(x, joint=joint, diagonal_output=diagonal_output)
        else:
            answer = predictive.probabilities(
                x, link, n_samples, diagonal_output=diagonal_output, generator=generator
            )
        if isinstance(answer, tuple):
            mean, covariance = answer
            return _checked(self, mean), _checked(self, covariance)
        return _checked(self, answer)


def _taken(self: Shell, x: Inputs) -> Inputs:
    """What the model takes of the inputs.

    Raises:
        TypeError: if they are no inputs.
        ValueError: if they hold no sample.
    """
    if batch_length(x) == 0:
        raise ValueError("the model inputs hold no sample; give at least one.")
    return self._keys.entered(x)


def _of_networks(
    self: Shell,
    inputs: Inputs,
    n_samples: int | None,
    generator: torch.Generator | None,
    moments: bool,
    model_kwargs: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    """Moments or mean probabilities of sampled networks."""
    n_samples = NETWORKS if n_samples is None else n_samples
    if moments and n_samples == 1:
        raise ValueError("the variance of sampled networks needs n_samples of at least 2.")
    samples = sampled_outputs(self, inputs, n_samples, generator, **model_kwargs)
    if moments:
        return samples.mean(0), samples.var(0)
    return inverse_link_of(self.likelihood)(samples).mean(0)


def _checked(self: Shell, prediction: Tensor) -> Tensor:
    """As a prediction of the model itself would come, and finite."""
    prediction = in_precision_of(self.model, prediction)
    require_finite(prediction)
    return prediction


@public_call
def informed_probabilities(
    self: Shell,
    x: Inputs,
    link_approx: LinkApprox | str | None = None,
    *,
    positions: Positions | str = Positions.ALL,
) -> tuple[Tensor, Tensor]:
    """Probabilities as of ``la(x)``, and the mutual information of label and weights, in nats.

    Both are of the same moments. The information is [m] ([m, T] for outputs at T positions), summed
    over binary labels.
    """
    link = _link(self, link_approx, PredType.GLM)
    at = checked_positions(positions, PredType.GLM)
    return linearised(self, at).informed_probabilities(_taken(self, x), link)


def linearised(self: Shell, positions: Positions = Positions.ALL) -> Predictive:
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


@public_call
def report_outputs(
    self: Shell,
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
    link = _link(self, link_approx, PredType.GLM)
    at = checked_positions(positions, PredType.GLM)
    return outputs_report(linearised(self, at), _taken(self, x), link)


@public_call
def host_moments(
    self: Shell, X: Inputs, joint: bool = False, diagonal_output: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the linearised outputs, as laplace-torch's method of the name."""
    x = _taken(self, X)
    return linearised(self).host_moments(x, joint=joint, diagonal_output=diagonal_output)


def sampled_outputs(
    self: Shell,
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
        require_finite(outputs, sampled=True)
    return outputs


def _link(self: Shell, link_approx: LinkApprox | str | None, pred: PredType) -> LinkApprox:
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


@public_call
def functional_samples(
    self: Shell,
    x: Inputs,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    *,
    positions: Positions | str = Positions.ALL,
) -> Tensor:
    """Samples of the outputs [n_samples, m, C].

    With "glm" each is one function of the inputs, f + J (w_s − w): the s-th of every call with a
    generator of the same state belongs to the same weights, whatever the batch and its size. They
    come in pairs f ± J (w_s − w), so that the mean of an even number is f itself. A pair costs
    about three forward passes, whatever C is.

    Args:
        self: a fitted posterior.
        x: model inputs, m samples.
        pred_type: "glm", the linearised network, or "nn", sampled networks.
        n_samples: how many.
        diagonal_output: "glm": independent draws of every output from its variance.
        generator: source of the draws; by default torch's global one.
        positions: of a sequence "all", or "last" as in ``__call__``.

    Raises:
        NotFittedError: before ``fit``.
        ModelChangedError: if the model is no longer the one of the fit.
        ValueError: for an unknown or impossible combination.
    """
    self._check_H_init()
    check_generator(generator, self._device)
    checked_flag("diagonal_output", diagonal_output)
    pred = checked_pred_type(pred_type)
    last = checked_positions(positions, pred) is Positions.LAST
    n_samples, x = checked_integer("n_samples", n_samples), _taken(self, x)
    if pred is PredType.NN:
        return sampled_outputs(self, x, n_samples, generator)
    if diagonal_output:
        moments = linearised(self).host_moments(x, joint=False, diagonal_output=True)
        for part in moments:
            require_finite(part)
        return gaussian_samples(*moments, n_samples, generator)
    self._check_model()
    # What cannot be held must not take hours before that shows.
    size = n_samples, batch_length(x), self.fitted.n_outputs
    torch.empty(size, dtype=self._dtype, device=self._device)
    products = self._target.products(self.coverage, self._arguments.options.byte_budget)
    with exact_arithmetic(self._device), undrawn_on_failure(generator, self._device):
        deviations = (_deviation(self, generator) for _ in range((n_samples + 1) // 2))
        outputs, found = products.along(
            x, deviations, last_position=last, differentiable=self.enable_backprop
        )
    draws = [outputs + sign * product for product in found for sign in (1.0, -1.0)]
    return torch.stack(draws[:n_samples])


def _deviation(self: Shell, generator: torch.Generator | None) -> Tensor:
    """One draw of the weights, less their mean [P].

    Always drawn alone, so that none depends on how many there are.
    """
    with outside_inference_mode(), torch.no_grad():
        return self.sample(1, generator).reshape(-1) - self.mean


@public_call
def sample(self: Shell, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
    """Weight samples [n_samples, P] from the posterior.

    Raises:
        NotFittedError: before ``fit``; no random number is drawn then.
    """
    self._check_H_init()
    check_generator(generator, self._device)
    shape = checked_integer("n_samples", n_samples), self.n_params
    with undrawn_on_failure(generator, self._device):
        noise = torch.randn(shape, device=self._device, dtype=self._dtype, generator=generator)
        return self.mean + self._decorrelated(noise)


@public_call
def predictive_samples(
    self: Shell,
    x: Inputs,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    *,
    positions: Positions | str = Positions.ALL,
) -> Tensor:
    """Samples after the inverse link [n_samples, m, C]; all as in ``functional_samples``."""
    check_generator(generator, self._device)
    with undrawn_on_failure(generator, self._device):
        samples = functional_samples(
            self, x, pred_type, n_samples, diagonal_output, generator, positions=positions
        )
        return samples if self.likelihood in MOMENTS else inverse_link_of(self.likelihood)(samples)
