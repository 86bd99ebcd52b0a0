"""Draws of a fitted posterior's outputs and predictions."""

from __future__ import annotations

import torch
from laplace.utils.enums import PredType
from torch import Tensor

from laplace_debiased.checks import checked_flag, checked_integer
from laplace_debiased.likelihoods import gaussian_samples
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.modes import public_call
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import undrawn_on_failure
from laplace_debiased.options import Positions
from laplace_debiased.posterior.predicting import (
    MOMENTS,
    Fitted,
    Inputs,
    check_generator,
    checked_positions,
    checked_pred_type,
    inverse_link_of,
    linearised,
    require_finite,
    sampled_outputs,
)
from laplace_debiased.predictive.draws import mirrored_draws


@public_call
def functional_samples(
    self: Fitted,
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
    n_samples = checked_integer("n_samples", n_samples)
    if pred is PredType.NN:
        return sampled_outputs(self, x, n_samples, generator)
    if diagonal_output:
        moments = linearised(self).host_moments(x, joint=False, diagonal_output=True)
        for part in moments:
            require_finite(part)
        return gaussian_samples(*moments, n_samples, generator)
    self._check_model()
    products = self._target.products(self.coverage, self._arguments.options.byte_budget)
    with exact_arithmetic(self._device), undrawn_on_failure(generator, self._device):
        deviations = (_deviation(self, generator) for _ in range((n_samples + 1) // 2))
        outputs, found = products.along(
            x, deviations, last_position=last, differentiable=self.enable_backprop
        )
    return mirrored_draws(outputs, found, n_samples)


def _deviation(self: Fitted, generator: torch.Generator | None) -> Tensor:
    """One draw of the weights, less their mean [P].

    Always drawn alone, so that none depends on how many there are.
    """
    with outside_inference_mode(), torch.no_grad():
        return self.sample(1, generator).reshape(-1) - self.mean


@public_call
def predictive_samples(
    self: Fitted,
    x: Inputs,
    pred_type: PredType | str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    *,
    positions: Positions | str = Positions.ALL,
) -> Tensor:
    """Samples after the inverse link [n_samples, m, C]; all as in ``functional_samples``."""
    samples = functional_samples(
        self, x, pred_type, n_samples, diagonal_output, generator, positions=positions
    )
    return samples if self.likelihood in MOMENTS else inverse_link_of(self.likelihood)(samples)
