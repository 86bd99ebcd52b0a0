"""The debiased Kronecker posterior over all weights, a laplace-torch ``KronLaplace``."""

from __future__ import annotations

from typing import Any

import torch
from laplace.baselaplace import KronLaplace
from laplace.curvature.curvature import CurvatureInterface
from torch import Tensor, nn

from laplace_debiased.curvature import layer_coverage
from laplace_debiased.posterior.configure import settings_from, with_noise
from laplace_debiased.posterior.kron_base import KronPosterior


class DebiasedKronLaplace(KronPosterior, KronLaplace):
    """Kronecker posterior whose directions and magnitudes come from different data.

    Every covered parameter tensor has a block U diag(h·N·λ + δ) Uᵀ with a Kronecker eigenbasis
    U = U_B ⊗ U_A and a full table λ of *per-sample mean* curvatures along it;
    h = 1/(σ²·temperature), and δ is the prior precision.

    Args:
        model: trained network; never changed.
        likelihood: "classification" (softmax cross-entropy; outputs [m, C], or [m, T, C] with
            targets [m, T], where N counts sequences), "regression" (Gaussian), "bernoulli"
            (independent binary labels from logits [m, C]) or "reward_modeling" (fitted on pairs
            [m, 2, ...], predicts rewards).
        sigma_noise: σ of the Gaussian likelihood, or "residual": every fit then sets it to the
            root mean square of its training residuals, over samples and outputs (the
            maximum-likelihood estimate, too small for a network that interpolates its data).
        prior_precision: δ, a scalar or one entry per covered parameter tensor.
        prior_mean: mean of the prior, a scalar or one entry per covered parameter.
        temperature: temperature of the likelihood.
        enable_backprop: keep predictions differentiable with respect to the inputs.
        dict_key_x: key of the inputs in mapping batches.
        dict_key_y: key of the labels in mapping batches.
        backend: a laplace-torch curvature backend for ``magnitudes="kfac"``; by default our own
            pass. It fixes the Fisher type.
        damping: not supported (without effect in laplace-torch); must be False.
        backend_kwargs: arguments of the backend.
        asdl_fisher_kwargs: arguments of every call of an ASDL backend.
        **options: ``scheme``, ``magnitudes``, ``sampling``, ``fisher``, ``mc_samples``, ``folds``,
            ``direction_fraction``, ``pool_size``, ``ratio_step``, ``byte_budget``, ``strict``: see
            :class:`~laplace_debiased.options.CurvatureOptions`. ``ignore_index``: class label that
            does not count, as of padding (often -100). ``allow_probabilities``: take class outputs
            that all sum to one for logits, in place of an error.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
        CoverageError: if nothing is covered, or with ``strict=True`` if a trainable parameter is
            not.
    """

    _key = ("all", "debiased_kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        sigma_noise: float | Tensor | str = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        asdl_fisher_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        settings = settings_from(model, likelihood, backend, backend_kwargs, damping, options)
        settings, sigma_noise = with_noise(settings, sigma_noise)
        coverage, _ = layer_coverage(model, host_layers=backend is not None)
        coverage.require(strict=settings.strict)
        super().__init__(
            model,
            settings.host_likelihood,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
            backend=backend,
            backend_kwargs=backend_kwargs,
            asdl_fisher_kwargs=asdl_fisher_kwargs,
        )
        self._configure(settings, coverage)
        self.sigma_noise = sigma_noise
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.mean = torch.as_tensor(self.prior_mean)
