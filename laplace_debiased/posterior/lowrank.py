"""The debiased low-rank posterior over all weights, a laplace-torch ``LowRankLaplace``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from laplace.baselaplace import LowRankLaplace, ParametricLaplace
from torch import Tensor, nn

from laplace_debiased.checks import checked_integer
from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.posterior.configure import Settings, settings_from, with_noise
from laplace_debiased.posterior.lowrank_base import LowRankPosterior


class DebiasedLowRankLaplace(LowRankPosterior, LowRankLaplace):
    """Low-rank posterior whose directions and magnitudes come from different data.

    The precision is h·N·U diag(λ) Uᵀ + D: λ [k] are *per-sample mean* curvatures along the
    orthonormal directions U [P, k], h = 1/(σ²·temperature), and D is the diagonal prior. Directions
    are eigenvectors of one batch's generalized Gauss-Newton matrix, magnitudes their directional
    curvatures on another. With several folds, the matrices of all folds are averaged and
    decomposed again. Any differentiable network will do: every parameter that requires gradients
    is covered, whatever its layer.

    The GGN only (or a Fisher matrix of the same form): a Hessian has negative eigenvalues away
    from an exact minimum, and a precision with them is no posterior.

    Args:
        model: trained network; never changed.
        likelihood: "classification" (softmax cross-entropy), "regression" (Gaussian), "bernoulli"
            (binary labels from logits [m, C]) or "reward_modeling".
        sigma_noise: σ of the Gaussian likelihood, or "residual" as in ``DebiasedKronLaplace``.
        prior_precision: a scalar, one entry per covered parameter tensor, or one per entry [P].
        prior_mean: mean of the prior, a scalar or one entry per covered parameter.
        temperature: temperature of the likelihood.
        enable_backprop: keep predictions differentiable with respect to the inputs.
        dict_key_x: key of the inputs in mapping batches.
        dict_key_y: key of the labels in mapping batches.
        backend: must be None; the curvature is our own.
        backend_kwargs: must be None.
        **options: ``rank`` (number of directions; None keeps all that are not rounding noise),
            ``magnitudes`` ("ggn", or "rayleigh_ritz" for the whole matrix Uᵀ G U in place of its
            diagonal), ``scheme``, ``sampling``, ``fisher``, ``mc_samples``, ``folds``,
            ``direction_fraction``, ``pool_size``, ``ratio_step``, ``byte_budget``, ``strict``: see
            :class:`~laplace_debiased.options.CurvatureOptions`.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
        CoverageError: if no parameter requires gradients.
    """

    _key = ("all", "debiased_lowrank")

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
        backend: None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        settings = low_rank_settings(model, likelihood, backend, backend_kwargs, options)
        settings, sigma_noise = with_noise(settings, sigma_noise)
        coverage = parameter_coverage(model)
        coverage.require(strict=settings.strict)
        # Not LowRankLaplace's own: it asks for a package that no plain install has.
        ParametricLaplace.__init__(
            self,
            model,
            settings.host_likelihood,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
        )
        self._configure(settings, coverage)
        self.sigma_noise = sigma_noise
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.mean = torch.as_tensor(self.prior_mean)


def low_rank_settings(
    model: nn.Module,
    likelihood: object,
    backend: object,
    backend_kwargs: dict[str, Any] | None,
    options: dict[str, Any],
) -> Settings:
    """Check and complete a low-rank posterior's arguments.

    Raises:
        ValueError, TypeError: for what is unknown, out of range or contradictory.
    """
    if backend is not None:
        raise ValueError(
            "hessian_structure='lowrank' computes its own curvature; leave backend=None (and "
            "choose the Fisher type with fisher=)."
        )
    settings = settings_from(model, likelihood, None, backend_kwargs, False, options, low_rank=True)
    if settings.rank is None:
        return settings
    return replace(settings, rank=checked_integer("rank", settings.rank))
