"""What the Kronecker and the low-rank posteriors share around a fit: noise, evidence, state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from laplace.baselaplace import ParametricLaplace
from torch import Tensor

from laplace_debiased.checks import positive_value
from laplace_debiased.curvature import Coverage
from laplace_debiased.estimation.fitting import FitRequest, resolve_scheme
from laplace_debiased.likelihoods import LikelihoodName
from laplace_debiased.network.outputs import check_weights
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.options import CurvatureOptions
from laplace_debiased.posterior.configure import Settings
from laplace_debiased.posterior.tunable import TunablePosterior


class Estimate(Protocol):
    """What every estimate tells beside its curvature."""

    @property
    def effective_samples(self) -> float | None:
        """How many samples of equal curvature would estimate its scale as steadily."""

    @property
    def mean_loss(self) -> float:
        """Mean loss over the draws, in nats."""

    @property
    def n_outputs(self) -> int:
        """C."""


class FittedPosterior(TunablePosterior):
    """A posterior that is fitted from batches of curvature.

    A concrete posterior names the functions that write and read its state.
    """

    _fitted: Any
    _prior_precision: Tensor
    _sigma_noise: Tensor
    _to_state: ClassVar[Callable[..., dict[str, Any]]]
    _from_state: ClassVar[Callable[..., None]]

    @abstractmethod
    def _make_pass(self, coverage: Coverage) -> Any:
        """The pass over the network for these parameters."""

    @abstractmethod
    def _adopt(self, fitted: Any, coverage: Coverage, watch: ModelWatch) -> None:
        """Take over a finished estimate; nothing in it can fail half-way."""

    @abstractmethod
    def _check_prior_length(self, value: object) -> None:
        """Refuse a prior precision that does not fit the coverage."""

    def _configure(self, settings: Settings, coverage: Coverage) -> None:
        self._settings = settings
        self.likelihood = settings.likelihood
        self._static_coverage = coverage
        self._fitted = None
        self._set_coverage(coverage)

    def _at_present_weights(self) -> AbstractContextManager[None]:
        """Around a fit: the model that is fitted is the user's own, at its present weights."""
        return nullcontext()

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision δ: [1], or one entry per covered parameter tensor; low rank: or [P]."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None:
        value = positive_value("prior_precision", prior_precision)
        if not hasattr(self, "coverage"):  # under construction, or the last layer is not known yet
            prior = torch.as_tensor(value, dtype=self._dtype).detach()
            self._prior_precision = prior.reshape(-1)
            return
        self._check_prior_length(value)
        ParametricLaplace.prior_precision.fset(self, value)

    @property
    def sigma_noise(self) -> Tensor:
        """Noise standard deviation σ of the Gaussian likelihood."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        value = positive_value("sigma_noise", sigma_noise)
        scale = float(torch.as_tensor(value).detach().sum())
        if self.likelihood != LikelihoodName.REGRESSION and scale != 1.0:
            raise ValueError("sigma_noise other than 1 is for likelihood='regression' only.")
        ParametricLaplace.sigma_noise.fset(self, value)

    def _resolved_options(self, request: FitRequest) -> CurvatureOptions:
        settings = self._settings
        scheme = resolve_scheme(settings.scheme, settings.options.scheme, request)
        folds = settings.options.folds if request.magnitude_loader is None else 2
        return replace(settings.options, scheme=scheme, folds=folds)

    @contextmanager
    def _begin(self, request: FitRequest) -> Iterator[tuple[CurvatureOptions, Any, ModelWatch]]:
        """Options with the scheme resolved, the fit to add to if any, and a watch over the model.

        To be entered around a fit, and before anything that looks at the weights' device.

        Raises:
            ValueError: if the arguments contradict each other.
            NumericalError: for weights that are not finite.
            ModelChangedError: if the fit to add to was made at other weights.
        """
        with self._at_present_weights():
            options = self._resolved_options(request)
            check_weights(self._covered_model)
            previous = None if request.override else self._fitted
            yield options, previous, self._watch_over(adding=previous is not None)

    def _take_over(self, fitted: Any, coverage: Coverage, watch: ModelWatch) -> None:
        """Adopt a finished fit, and the σ of its residuals where the posterior was asked to."""
        estimate: Estimate = fitted.estimate
        noise = self._residual_noise(estimate.mean_loss, estimate.n_outputs)
        self._adopt(fitted, coverage, watch)
        if noise is not None:
            self.sigma_noise = noise

    def _renew(self) -> None:
        self._set_coverage(self.coverage)
        self._pass = self._make_pass(self.coverage)

    @property
    def effective_sample_size(self) -> float | None:
        """How many samples of equal curvature would estimate its scale as steadily.

        (Σ w h)² / Σ (w h)² over the draws of the latest fit, h = tr ∇²_f ℓ and w the importance
        weight; None where a laplace-torch backend made the fit, or for states of version 1.

        Raises:
            NotFittedError: before ``fit``.
        """
        self._check_H_init()
        assert self._fitted is not None
        return self._fitted.estimate.effective_samples

    def log_marginal_likelihood(
        self,
        prior_precision: Tensor | None = None,
        sigma_noise: Tensor | None = None,
    ) -> Tensor:
        """Laplace approximation of the log marginal likelihood, differentiable in both arguments.

        As in laplace-torch, values that are passed stay set; not so if they are refused.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: for values that are not positive, or a sigma in classification.
        """
        self._check_H_init()
        before = self._prior_precision, self._sigma_noise
        try:
            return super().log_marginal_likelihood(prior_precision, sigma_noise)
        except Exception:
            self._prior_precision, self._sigma_noise = before
            raise

    def state_dict(self) -> dict[str, Any]:
        """Everything that a posterior needs beside its model: tensors and plain values only.

        Raises:
            NotFittedError: before ``fit``.
        """
        self._check_H_init()
        return type(self)._to_state(self)

    def load_state_dict(self, state_dict: dict[str, Any], *, check_weights: bool = True) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state_dict: the state.
            check_weights: refuse a model with other weights; False checks names and shapes only.

        Raises:
            ValueError: if it belongs to another class, likelihood, model or set of parameters.
                Nothing is changed then.
        """
        type(self)._from_state(self, state_dict, check_weights=check_weights)
