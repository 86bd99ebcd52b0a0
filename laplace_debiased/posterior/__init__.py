"""The posteriors: subclasses of laplace-torch's with debiased curvature."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from laplace.baselaplace import KronLaplace, LowRankLaplace
from laplace.lllaplace import KronLLLaplace, LLLaplace
from laplace.utils.feature_extractor import FeatureReduction
from laplace.utils.matrix import Kron
from torch import Tensor, nn

from laplace_debiased.curvature.coverage import parameter_coverage
from laplace_debiased.errors import ArgumentTypeError
from laplace_debiased.estimation.kron import KronStructure, posterior_factors
from laplace_debiased.estimation.lowrank import LowRankStructure
from laplace_debiased.estimation.structure import Fit
from laplace_debiased.estimation.target import LastLayer, Target
from laplace_debiased.network.last_layer import check_last_layer_name
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.network.wrappers import own_name, plain_network
from laplace_debiased.operators import EigenKron, LowRank
from laplace_debiased.options import parse_choice
from laplace_debiased.posterior import priors
from laplace_debiased.posterior.host import DebiasedPosterior
from laplace_debiased.predictive import KronPredictor, LowRankPredictor

__all__ = [
    "DebiasedKronLLLaplace",
    "DebiasedKronLaplace",
    "DebiasedLowRankLLLaplace",
    "DebiasedLowRankLaplace",
]


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
        dict_key_x: key of the input in mapping batches, for a model that takes one tensor. One that
            takes the mapping whole, or names keys in its ``forward``, is given them as ever.
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

    def square_norm(self, value: Tensor) -> Tensor:
        """(θ − mean)ᵀ P (θ − mean), 0-d, of one θ [P]."""
        priors.check_value(self, value)
        return super().square_norm(value)


class DebiasedLowRankLaplace(DebiasedPosterior, LowRankLaplace):
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
        model, likelihood, sigma_noise, prior_mean, temperature, enable_backprop, dict_key_x,
            dict_key_y: as in ``DebiasedKronLaplace``.
        prior_precision: a scalar, one entry per covered parameter tensor, or one per entry [P].
        backend, backend_kwargs: must be None; the curvature is our own.
        **options: ``rank`` (number of directions; None keeps all that are not rounding noise), and
            those of ``DebiasedKronLaplace`` but for ``magnitudes`` and ``max_rank``.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
        CoverageError: if no parameter requires gradients.
    """

    _key = ("all", "debiased_lowrank")
    _structure_for = staticmethod(LowRankStructure)
    _takes_diagonal_prior = True
    _operator: LowRank

    def _host_curvature(self, fit: Fit, predictor: LowRankPredictor) -> dict[str, Any]:
        basis = predictor.pairs.basis
        summed = (predictor.pairs.eigenvalues * fit.n_data).to(basis)
        operator = LowRank(basis, summed, torch.ones(()), predictor.layer_sizes)
        return {"H": (basis, summed), "_operator": operator}

    @property
    def rank(self) -> int:
        """Number of directions of the fitted posterior.

        Raises:
            NotFittedError: before ``fit``.
        """
        return self.fitted.curvature.rank

    @property
    def posterior_precision(self) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((U [P, k], h·N·λ [k]), prior diagonal [P]), as laplace-torch gives it."""
        self._check_H_init()
        self._checked_prior()
        return (self.H[0], self._H_factor * self.H[1]), self.prior_precision_diag

    @property
    def precision_operator(self) -> LowRank:
        """The posterior precision (a sum over the training set, prior added) as an operator."""
        self._check_H_init()
        return self._operator.scaled(self._H_factor).with_prior(self._checked_prior())

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """Log-determinant of the posterior precision, 0-d."""
        return self.precision_operator.logdet()

    @property
    def log_det_ratio(self) -> Tensor:
        """Log det P − log det D, 0-d; for a scalar D without the large terms that cancel."""
        self._check_H_init()
        if self.prior_precision.numel() == 1:
            return torch.log1p(self._H_factor * self.H[1] / self.prior_precision).sum()
        return super().log_det_ratio

    def square_norm(self, value: Tensor) -> Tensor:
        """(θ − mean)ᵀ P (θ − mean) for each θ in [..., P]."""
        priors.check_value(self, value, one=False)
        return self.precision_operator.square_norm(value - self.mean)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Covariance [m, C, C] of linearised outputs from Jacobians [m, C, P]."""
        return self.precision_operator.inv_square_form(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Joint covariance [m·C, m·C] of linearised outputs from Jacobians [m, C, P]."""
        if not isinstance(Js, Tensor) or Js.ndim != 3:
            got = tuple(Js.shape) if isinstance(Js, Tensor) else type(Js).__name__
            raise ValueError(f"Js must be Jacobians [m, C, P]; got {got}.")
        return self.precision_operator.inv_square_form(Js.flatten(0, 1).unsqueeze(0)).squeeze(0)

    def _decorrelated(self, noise: Tensor) -> Tensor:
        return self.precision_operator.detach().sqrt_solve(noise)


def last_layer_target(model: nn.Module, options: dict[str, Any]) -> Target:
    """The last layer of a model as a target; takes the options that say which out of the others."""
    name, reduction = options.pop("last_layer_name", None), options.pop("feature_reduction", None)
    if reduction is not None:
        reduction = parse_choice(FeatureReduction, reduction, "feature_reduction")
    if not isinstance(name, str | None):
        raise ArgumentTypeError(f"last_layer_name must be a string; got {type(name).__name__}.")
    model = plain_network(checked_model(model))
    if next(model.parameters(), None) is None:
        parameter_coverage(model).require(strict=False)
    name = own_name(model, name)
    check_last_layer_name(model, name)
    return Target(model, LastLayer(name, reduction, is_given=name is not None))


class DebiasedKronLLLaplace(DebiasedKronLaplace, KronLLLaplace):
    """Kronecker posterior over the last layer, whose predictive needs no Jacobian.

    It works on the user's own network, without a hook in it. The last layer is the one
    that ``last_layer_name`` says, or is found by one forward pass at every ``fit``. Everything else
    is as in :class:`DebiasedKronLaplace`; magnitudes of the last layer need no backward pass, and
    in classification (with ``fisher="type2"``) C² operations per sample.

    Args:
        model: trained network with a linear last layer; never changed.
        feature_reduction: how features of more than two dimensions are reduced, as the model does:
            "pick_first", "pick_last" or "average".
        last_layer_name: qualified name of the last layer; found at every fit by default.
        **options: as in :class:`DebiasedKronLaplace`.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
    """

    _key = ("last_layer", "debiased_kron")
    _target_for = staticmethod(last_layer_target)


class DebiasedLowRankLLLaplace(DebiasedLowRankLaplace, LLLaplace):
    """Low-rank posterior over the last layer, whose rows need no backward pass.

    Everything else is as in :class:`DebiasedLowRankLaplace`; ``feature_reduction`` and
    ``last_layer_name`` are those of :class:`DebiasedKronLLLaplace`.
    """

    _key = ("last_layer", "debiased_lowrank")
    _target_for = staticmethod(last_layer_target)
