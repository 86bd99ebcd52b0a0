"""The debiased Kronecker posterior over all weights, a laplace-torch ``KronLaplace``."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from laplace.baselaplace import KronLaplace
from laplace.utils.matrix import Kron
from torch import Tensor

from laplace_debiased.estimation import Fit, KronStructure, posterior_factors
from laplace_debiased.operators import EigenKron
from laplace_debiased.posterior.host import DebiasedPosterior
from laplace_debiased.predictive import KronPredictor


class FactorsOnDemand(Kron):
    """A fit's factors as laplace-torch keeps them, formed when they are first asked for.

    Nothing here uses them; of a fit of few samples they are larger by far than all that it holds.

    Args:
        fit: the fit.
    """

    def __init__(self, fit: Fit) -> None:
        self._fit = fit

    @cached_property
    def kfacs(self) -> list[list[Tensor]]:
        """[N·B, A] of every weight, [N·B] of every vector."""
        return posterior_factors(self._fit)


class DebiasedKronLaplace(DebiasedPosterior, KronLaplace):
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
        **options: ``scheme``, ``magnitudes``, ``sampling``, ``fisher``, ``mc_samples``,
            ``columns``, ``folds``, ``direction_fraction``, ``pool_size``, ``byte_budget``,
            ``max_rank``, ``strict``: see
            :class:`~laplace_debiased.options.CurvatureOptions`. ``ignore_index``: class label that
            does not count, as of padding (often -100). ``n_outputs``: of how many outputs of each
            sample predictions need moments, the most probable ones; None for all, "auto" for 32 of
            more than 64. ``allow_probabilities``: take class outputs that all sum to one for
            logits, in place of an error.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
        CoverageError: if nothing is covered, or with ``strict=True`` if a trainable parameter is
            not.
    """

    _key = ("all", "debiased_kron")
    _structure_for = staticmethod(KronStructure)

    def _host_curvature(self, fit: Fit, predictor: KronPredictor) -> dict[str, Any]:
        return {"H": predictor.curvature, "H_facs": FactorsOnDemand(fit)}

    @property
    def posterior_precision(self) -> EigenKron:
        """h·N·λ + δ in its eigenbasis, per block (a sum over the training set)."""
        return self._precision()

    def _decorrelated(self, noise: Tensor) -> Tensor:
        return self.posterior_precision.bmm(noise, exponent=-0.5)
