"""The shell around a fitted curvature: laplace-torch's interface, and its one writer."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from laplace.baselaplace import ParametricLaplace
from laplace.curvature.curvature import CurvatureInterface
from laplace.utils.enums import LinkApprox
from torch import Tensor, nn

from laplace_debiased.checks import checked_flag, positive_value
from laplace_debiased.curvature import Coverage
from laplace_debiased.data.keys import Keys
from laplace_debiased.errors import NotFittedError
from laplace_debiased.estimation.arguments import (
    Arguments,
    FitRequest,
    arguments_from,
    backend_from,
)
from laplace_debiased.estimation.report import FitReport
from laplace_debiased.estimation.structure import Fit, Structure
from laplace_debiased.estimation.target import Target
from laplace_debiased.files import PathLike
from laplace_debiased.likelihoods import LikelihoodName
from laplace_debiased.network.entry import OneEntry
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.posterior import fitting, predicting, priors, saving
from laplace_debiased.predictive import Predictor
from laplace_debiased.predictive.call import checked_link
from laplace_debiased.predictive.predictor import PreparedPrecision
from laplace_debiased.tuning import TuningResult

if TYPE_CHECKING:
    from laplace.baselaplace import ParametricLaplace as _Host
else:
    _Host = object  # the concrete posterior brings laplace-torch's class


class DebiasedPosterior(_Host):
    """The only mixin over a laplace-torch posterior.

    It holds what a posterior consists of (arguments, target, structure, fit, predictor, and a
    watch over the model), and it alone writes laplace-torch's attributes. A concrete posterior
    names its structure, whether a prior may be diagonal, and what laplace-torch calls ``H``; one
    over the last layer also its target. Their arguments are those of ``DebiasedKronLaplace``.
    """

    model: Any
    likelihood: str
    _tuned_link_approx: LinkApprox | None = None
    _coverage: Coverage | None = None
    _fit: Fit | None = None
    _fitted_on: FitRequest | None = None
    _predictor: Predictor | None = None
    _watch: ModelWatch | None = None
    _warned_about_link: bool = False
    _settled: frozenset[str] = frozenset()
    _takes_diagonal_prior: ClassVar[bool] = False
    _prior_precision: Tensor
    _sigma_noise: Tensor

    @staticmethod
    def _target_for(model: nn.Module, options: dict[str, Any]) -> Target:
        """Which of a model's weights are meant; takes the options that say so from the others."""
        return Target(model)

    @staticmethod
    @abstractmethod
    def _structure_for(arguments: Arguments) -> Structure:
        """The structure of this posterior."""

    @abstractmethod
    def _host_curvature(self, fit: Fit, predictor: Any) -> dict[str, Any]:
        """What laplace-torch knows of a fit, by attribute: ``H`` and its like."""

    @abstractmethod
    def _decorrelated(self, noise: Tensor) -> Tensor:
        """Standard normal numbers [..., P] with the posterior's covariance."""

    # -- construction ----------------------------------------------------------------------

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
        of_a_subclass, target = set(vars(self)), self._target_for(model, options)
        arguments = arguments_from(
            likelihood,
            options,
            sigma_noise=sigma_noise,
            dict_keys=(dict_key_x, dict_key_y),
            backend=backend_from(backend, backend_kwargs, asdl_fisher_kwargs),
            damping=damping,
            low_rank=self._takes_diagonal_prior,
        )
        self._arguments, self._structure = arguments, self._structure_for(arguments)
        self._target, self._prepared = target, PreparedPrecision()
        self._keys = Keys(dict_key_y, OneEntry(target.model, dict_key_x))
        self._chosen = None
        if target.is_located:
            self._chosen = self._structure.coverage(target)
            self._chosen.require(strict=arguments.strict)
        self.H_facs, self.damping = None, False
        # Not the concrete host's own: it may ask for a package that no plain install has, or copy
        # the model. Priors follow below, when it is known what is covered.
        ParametricLaplace.__init__(
            self,
            target.model,
            arguments.host_likelihood,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=arguments.dict_key_x,
            dict_key_y=arguments.dict_key_y,
            backend=backend,
            backend_kwargs=dict(backend_kwargs or {}),
            asdl_fisher_kwargs=dict(asdl_fisher_kwargs or {}),
        )
        self.likelihood = arguments.likelihood
        self._set_target(target, self._chosen)
        self.sigma_noise = 1.0 if isinstance(sigma_noise, str) else sigma_noise
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.mean = torch.as_tensor(self.prior_mean)
        self.tuning_result: TuningResult | None = None
        self._settled = frozenset(vars(self)) - of_a_subclass

    __setattr__ = fitting.set_attribute

    def _init_H(self) -> None:  # noqa: N802
        # laplace-torch allocates dense zeros here; before a fit there is nothing to hold.
        self.H: Any = None

    def _set_target(self, target: Target, coverage: Coverage | None) -> None:
        """Restrict the posterior to the covered parameters of a target, if they are known."""
        if self.model is target.model or self._target is not target:
            self.__dict__.update(model=target.network)
        elif target.last_layer is not None and target.last_layer.name is not None:
            self.model.set_last_layer(target.last_layer.name)  # may be another object now
        self._target = target
        if coverage is None:
            return
        self._coverage = coverage
        params = target.parameters(coverage)
        self.__dict__.update(
            params=params,
            n_params=sum(parameter.numel() for parameter in params),
            n_layers=len(params),
            is_subset_params=bool(coverage.excluded),
        )

    @property
    def coverage(self) -> Coverage:
        """Which parameters carry a posterior, which were left out and why.

        Raises:
            NotFittedError: while the last layer is not known.
        """
        if self._coverage is None:
            raise NotFittedError(
                "the last layer is not known yet: call fit(train_loader) first, or name it with "
                "last_layer_name."
            )
        return self._coverage

    # -- hyper-parameters ------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the posterior: the model's, but float32 for half precision."""
        return self._target.dtype

    @property
    def temperature(self) -> float:
        """Temperature of the likelihood, positive."""
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._temperature = float(
            positive_value("temperature", temperature, self._dtype, single=True)
        )

    @property
    def ignore_index(self) -> int | None:
        """Class label that does not count; None if all do."""
        return self._arguments.ignore_index

    @property
    def prior_precision(self) -> Tensor:
        """Prior precision δ: [1], or one entry per covered parameter tensor; low rank: or [P]."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, prior_precision: float | Tensor) -> None:
        value = positive_value("prior_precision", prior_precision, self._dtype)
        if self._coverage is None:  # under construction, or the last layer is not known yet
            prior = torch.as_tensor(value, dtype=self._dtype).detach()
            self._prior_precision = prior.reshape(-1)
            return
        priors.check_prior(value, self._coverage, takes_diagonal=self._takes_diagonal_prior)
        ParametricLaplace.prior_precision.fset(self, value)

    @property
    def sigma_noise(self) -> Tensor:
        """Noise standard deviation σ of the Gaussian likelihood."""
        return self._sigma_noise

    @sigma_noise.setter
    def sigma_noise(self, sigma_noise: float | Tensor) -> None:
        value = positive_value("sigma_noise", sigma_noise, self._dtype, single=True)
        scale = float(torch.as_tensor(value).detach().sum())
        if self.likelihood != LikelihoodName.REGRESSION and scale != 1.0:
            raise ValueError("sigma_noise other than 1 is for likelihood='regression' only.")
        ParametricLaplace.sigma_noise.fset(self, value)

    @property
    def prior_mean(self) -> Tensor:
        """Mean of the prior: a scalar, or one entry per covered parameter entry [P]."""
        return self._prior_mean

    @prior_mean.setter
    def prior_mean(self, prior_mean: float | Tensor) -> None:
        priors.check_prior_mean(prior_mean, None if self._coverage is None else self.n_params)
        ParametricLaplace.prior_mean.fset(self, prior_mean)

    @property
    def enable_backprop(self) -> bool:
        """Whether predictions stay differentiable with respect to the inputs."""
        return self._enable_backprop

    @enable_backprop.setter
    def enable_backprop(self, enable_backprop: bool) -> None:
        self._enable_backprop = checked_flag("enable_backprop", enable_backprop)

    @property
    def tuned_link_approx(self) -> LinkApprox | None:
        """The link that the prior precision was tuned with, which predictions use by default."""
        return self._tuned_link_approx

    @tuned_link_approx.setter
    def tuned_link_approx(self, link_approx: LinkApprox | str | None) -> None:
        self._tuned_link_approx = (
            None if link_approx is None else checked_link(link_approx, self.likelihood)
        )

    prior_precision_diag = property(priors.prior_precision_diag)

    # -- fitting ---------------------------------------------------------------------------

    fit = fitting.fit
    bias_report = fitting.bias_report
    __repr__ = fitting.described
    _check_model = fitting.check_model

    def _adopt(self, fit: Fit) -> None:
        """Take over a finished fit; what can fail comes first."""
        target = self._target if fit.last_layer is None else self._target.at(fit.last_layer)
        predictor = self._structure.predictor(self._structure.engine(target, fit.coverage), fit)
        mean, curvature = target.mean(fit.coverage), self._host_curvature(fit, predictor)
        self._set_target(target, fit.coverage)
        self._fit, self._predictor = fit, predictor
        self._watch = ModelWatch(fit.model, fit.probe)
        loss = fit.mean_loss * fit.n_data
        sizes = {"n_data": fit.n_data, "n_outputs": fit.n_outputs}
        self.__dict__.update(**curvature, **sizes, mean=mean, loss=loss)
        self.prior_precision, self.prior_mean = self._prior_precision, self._prior_mean
        self._posterior_scale = None

    @property
    def fitted(self) -> Fit:
        """The fitted curvature as a value: *per-sample means*, before any scaling to N.

        Raises:
            NotFittedError: before ``fit``.
        """
        self._check_H_init()
        assert self._fit is not None
        return self._fit

    @property
    def predictor(self) -> Predictor:
        """What predicts with the fitted curvature, before it is given a prior.

        Raises:
            NotFittedError: before ``fit``.
        """
        self._check_H_init()
        assert self._predictor is not None
        return self._predictor

    @property
    def arguments(self) -> Arguments:
        """What the posterior was asked for."""
        return self._arguments

    @property
    def effective_sample_size(self) -> float | None:
        """How many samples of equal curvature would estimate its scale as steadily.

        (Σ w h)² / Σ (w h)² over the draws of the latest fit, h = tr ∇²_f ℓ and w the importance
        weight; None for states that do not know it (of version 1, or of backends of then).

        Raises:
            NotFittedError: before ``fit``.
        """
        return self.fitted.effective_samples

    @property
    def fit_report(self) -> FitReport | None:
        """Where the time of the latest fit went; None for a posterior that was loaded.

        Raises:
            NotFittedError: before ``fit``.
        """
        return self.fitted.report

    def _check_H_init(self) -> None:  # noqa: N802
        if self._fit is None:
            raise NotFittedError("this posterior is not fitted: call fit(train_loader) first.")

    def _checked_prior(self) -> Tensor:
        """The prior precision, which may have been written to in place.

        Raises:
            ValueError: if it is not positive and finite.
        """
        positive_value("prior_precision", self._prior_precision)
        return self._prior_precision

    # -- the posterior ---------------------------------------------------------------------

    def _precision(self, *, differentiable: bool = True) -> Any:
        """The posterior precision as the predictor prepares it; kept until something changes.

        Args:
            differentiable: keep the graph of hyper-parameters that require gradients.
        """
        predictor = self.predictor
        return self._prepared.get(
            lambda: predictor.precision(self._H_factor, self._checked_prior()),
            *(predictor, self.prior_precision, self.sigma_noise, self.temperature),
            differentiable=differentiable,
        )

    _H_factor = property(priors.loss_scale)
    log_marginal_likelihood = priors.log_marginal_likelihood
    log_prob = priors.log_prob

    # -- prediction ------------------------------------------------------------------------

    __call__ = predicting.predict
    sample = predicting.sample
    functional_samples = predicting.functional_samples
    predictive_samples = predicting.predictive_samples
    outputs_report = predicting.report_outputs
    _glm_predictive_distribution = predicting.host_moments

    optimize_prior_precision = priors.optimize_prior_precision

    # -- files and copies ------------------------------------------------------------------

    state_dict = saving.state_dict
    load_state_dict = saving.load_state_dict
    save = saving.save
    _constructor_arguments = saving.constructor_arguments
    __reduce__ = saving.reduced

    @classmethod
    def load(
        cls,
        path: PathLike,
        model: nn.Module,
        *,
        map_location: torch.device | str | None = None,
        check_weights: bool = True,
    ) -> Self:
        """Read a posterior of this class; ``DebiasedLaplace.load`` reads any.

        Arguments and errors are the same; a file of another class is a StoredFileError.
        """
        return saving.loaded([cls], path, model, map_location, check_weights=check_weights)
