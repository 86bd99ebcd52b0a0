"""The debiased low-rank posterior over all weights, a laplace-torch ``LowRankLaplace``."""

from __future__ import annotations

from typing import Any

import torch
from laplace.baselaplace import LowRankLaplace
from torch import Tensor

from laplace_debiased.estimation import Fit, LowRankStructure
from laplace_debiased.operators import LowRank
from laplace_debiased.posterior.host import DebiasedPosterior
from laplace_debiased.predictive import LowRankPredictor


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
        return self.precision_operator.square_norm(value - self.mean)

    def functional_variance(self, Js: Tensor) -> Tensor:
        """Covariance [m, C, C] of linearised outputs from Jacobians [m, C, P]."""
        return self.precision_operator.inv_square_form(Js)

    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Joint covariance [m·C, m·C] of linearised outputs from Jacobians [m, C, P]."""
        return self.precision_operator.inv_square_form(Js.flatten(0, 1).unsqueeze(0)).squeeze(0)

    def _decorrelated(self, noise: Tensor) -> Tensor:
        return self.precision_operator.detach().sqrt_solve(noise)
