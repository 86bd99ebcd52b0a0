"""The shell around a fitted curvature: laplace-torch's interface, and its one writer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torchmetrics
from laplace.baselaplace import ParametricLaplace
from laplace.utils.enums import LinkApprox, PredType, PriorStructure, TuningMethod
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_debiased.checks import positive_value
from laplace_debiased.curvature import Coverage
from laplace_debiased.debiasing import BiasReport, bias_report
from laplace_debiased.errors import NotFittedError
from laplace_debiased.estimation import Arguments, Fit, FitRequest, Structure, Target, run_fit
from laplace_debiased.estimation.checkpoint import DEFAULT_INTERVAL
from laplace_debiased.files import PathLike
from laplace_debiased.likelihoods import (
    LikelihoodName,
    residual_noise,
)
from laplace_debiased.network.identity import ModelFingerprint
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.watch import ModelWatch
from laplace_debiased.posterior import predicting, saving, state
from laplace_debiased.posterior.predicting import (
    checked_link,
    checked_pred_type,
)
from laplace_debiased.posterior.priors import (
    PreparedPrecision,
    check_prior_mean,
)
from laplace_debiased.predictive import Predictor
from laplace_debiased.tuning import PriorGrid, Subject, TuningResult
from laplace_debiased.tuning.call import TuningCall, by_evidence, tuning_method

if TYPE_CHECKING:
    from laplace.baselaplace import ParametricLaplace as _Host
else:
    _Host = object  # the concrete posterior brings laplace-torch's class


class DebiasedPosterior(_Host):
    """The only mixin over a laplace-torch posterior.

    It holds what a posterior consists of (arguments, target, structure, fit, predictor, and a
    watch over the model), and it alone writes laplace-torch's attributes. A concrete posterior
    names its structure, what a prior must look like, and what laplace-torch calls ``H``.
    """

    model: Any
    likelihood: str
    tuned_link_approx: LinkApprox | None = None
    tuning_result: TuningResult | None = None
    _coverage: Coverage | None = None
    _fit: Fit | None = None
    _predictor: Predictor | None = None
    _watch: ModelWatch | None = None
    _warned_about_link: bool = False
    _takes_diagonal_prior: ClassVar[bool] = False
    _prior_precision: Tensor
    _sigma_noise: Tensor

    @staticmethod
    @abstractmethod
    def _structure_for(arguments: Arguments) -> Structure:
        """The structure of this posterior."""

    @staticmethod
    @abstractmethod
    def _check_prior(value: object, coverage: Coverage) -> None:
        """Refuse a prior precision that does not fit a coverage."""

    @abstractmethod
    def _host_curvature(self, fit: Fit, predictor: Any) -> dict[str, Any]:
        """What laplace-torch knows of a fit, by attribute: ``H`` and its like."""

    # -- construction ----------------------------------------------------------------------

    def _construct(
        self,
        arguments: Arguments,
        target: Target,
        *,
        sigma_noise: float | Tensor | str,
        prior_precision: float | Tensor,
        prior_mean: float | Tensor,
        temperature: float,
        enable_backprop: bool,
    ) -> None:
        """Set everything; to be called once, by a constructor, with checked arguments."""
        self._arguments, self._structure = arguments, self._structure_for(arguments)
        self._target, self._prepared = target, PreparedPrecision()
        self._chosen = None
        if target.is_located:
            self._chosen = self._structure.coverage(target)
            self._chosen.require(strict=arguments.strict)
        backend = arguments.backend
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
            backend=None if backend is None else backend.kind,
            backend_kwargs=None if backend is None else dict(backend.kwargs),
            asdl_fisher_kwargs=None if backend is None else dict(backend.kron_kwargs),
        )
        self.likelihood = arguments.likelihood
        self._set_target(target, self._chosen)
        self.sigma_noise = 1.0 if isinstance(sigma_noise, str) else sigma_noise
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean
        self.mean = torch.as_tensor(self.prior_mean)

    def _init_H(self) -> None:  # noqa: N802
        # laplace-torch allocates dense zeros here; before a fit there is nothing to hold.
        self.H: Any = None

    def _set_target(self, target: Target, coverage: Coverage | None) -> None:
        """Restrict the posterior to the covered parameters of a target, if they are known."""
        if self.model is target.model or self._target is not target:
            self.model = target.network
        elif target.last_layer is not None and target.last_layer.name is not None:
            self.model.set_last_layer(target.last_layer.name)  # may be another object now
        self._target = target
        if coverage is None:
            return
        self._coverage = coverage
        self.params = target.parameters(coverage)
        self.n_params = sum(parameter.numel() for parameter in self.params)
        self.n_layers = len(self.params)
        self.is_subset_params = bool(coverage.excluded)

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
        value = positive_value("temperature", temperature)
        self._temperature = float(torch.as_tensor(value, dtype=torch.float64))

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
        value = positive_value("prior_precision", prior_precision)
        if self._coverage is None:  # under construction, or the last layer is not known yet
            prior = torch.as_tensor(value, dtype=self._dtype).detach()
            self._prior_precision = prior.reshape(-1)
            return
        self._check_prior(value, self._coverage)
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

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of every covered entry [P]."""
        prior = self.prior_precision.to(self.mean)
        if len(prior) == 1:
            return prior.expand(self.n_params)
        if len(prior) == self.n_params:
            return prior
        sizes = torch.tensor([parameter.numel() for parameter in self.params], device=prior.device)
        return prior.repeat_interleave(sizes)

    # -- fitting ---------------------------------------------------------------------------

    def fit(
        self,
        train_loader: DataLoader,
        override: bool = True,
        progress_bar: bool = False,
        *,
        magnitude_loader: DataLoader | None = None,
        n_samples: int | str | None = "auto",
        n_data: int | None = None,
        seed: int = 0,
        checkpoint: PathLike | None = None,
        checkpoint_interval: float = DEFAULT_INTERVAL,
    ) -> None:
        """Estimate the curvature at the model's weights.

        Args:
            train_loader: training data; B with a ``magnitude_loader``.
            override: replace an earlier fit; False adds to it. With ``n_samples`` further samples
                are drawn and N stays; without, the new data extend the training set.
            progress_bar: show progress.
            magnitude_loader: B̃; both loaders are then walked whole.
            n_samples: curvature budget in all, drawn from the training set behind the loader; None
                for everything that the loader yields. "auto", Kronecker: 256 (2,048 for a last
                layer) where the loader can be drawn from and holds more, else everything, as with
                ``override=False`` and ``magnitude_loader``; low rank: everything or, without a
                ``rank``, as many samples as fit in memory (four times ``byte_budget``).
            n_data: N, when it is not the size of the training set behind the loader.
            seed: seed of every draw. The global generators are left as they are.
            checkpoint: file for what a Kronecker fit has so far. The same call goes on from there
                after a crash, loading but not computing the batches behind it, and gives the same
                posterior; on success the file is removed.
            checkpoint_interval: seconds between two writes of it; 0 writes after every batch.

        Raises:
            ValueError: for bad data, budgets, a checkpoint of another fit, or arguments that
                contradict each other.
            NumericalError: for NaN or infinite weights, outputs or curvature.
            CoverageError: if the forward pass shows that nothing can be covered.
            ModelChangedError: if ``override=False`` adds to a fit at other weights.
            An exception of the loader passes through. In all cases the earlier posterior and the
            model are left as they were.
        """
        request = FitRequest(
            train_loader,
            magnitude_loader,
            n_samples,
            n_data,
            seed,
            override,
            progress_bar,
            self.dict_key_y,
            checkpoint,
            checkpoint_interval,
        )
        previous = None if override else self._fit
        fit = run_fit(
            self._structure,
            self._target,
            self._arguments,
            request,
            previous,
            self._chosen or self._coverage,
            self._check_priors,
        )
        noise = None
        if self._arguments.residual_noise:
            noise = residual_noise(fit.mean_loss, fit.n_outputs)
        self._adopt(fit)
        if noise is not None:
            self.sigma_noise = noise

    def _check_priors(self, coverage: Coverage) -> None:
        """Refuse a coverage that the present priors do not fit."""
        self._check_prior(self._prior_precision, coverage)
        check_prior_mean(torch.as_tensor(self._prior_mean), coverage.n_covered)

    def _adopt(self, fit: Fit, model: ModelFingerprint | None = None) -> None:
        """Take over a finished fit; what can fail comes first.

        Args:
            fit: the fit.
            model: fingerprint of the model as it is now, where that is not the fit's.
        """
        target = self._target if fit.last_layer is None else self._target.at(fit.last_layer)
        predictor = self._structure.predictor(self._structure.engine(target, fit.coverage), fit)
        mean, curvature = target.mean(fit.coverage), self._host_curvature(fit, predictor)
        self._set_target(target, fit.coverage)
        self._fit, self._predictor = fit, predictor
        self._watch = ModelWatch(fit.model if model is None else model)
        for name, value in curvature.items():
            setattr(self, name, value)
        self.mean = mean
        self.prior_precision, self.prior_mean = self._prior_precision, self._prior_mean
        self.loss = fit.mean_loss * fit.n_data
        self.n_data, self.n_outputs = fit.n_data, fit.n_outputs
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
        weight; None where a laplace-torch backend made the fit, or for states of version 1.

        Raises:
            NotFittedError: before ``fit``.
        """
        return self.fitted.effective_samples

    def bias_report(self) -> BiasReport:
        """Own-batch against other-batch curvature along the posterior's directions.

        From the folds of the fit alone, no further pass.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: under ``scheme="single"``, which has no other batch.
        """
        fit = self.fitted
        blocks = max((len(part.own_tops) for part in fit.comparisons), default=0)
        names = fit.coverage.covered
        return bias_report(fit.comparisons, names if blocks == len(names) else ("lowrank",))

    def _check_H_init(self) -> None:  # noqa: N802
        if self._fit is None:
            raise NotFittedError("this posterior is not fitted: call fit(train_loader) first.")

    def _check_model(self) -> None:
        """Check that the model is as it was at the fit.

        Raises:
            ModelChangedError: naming what changed.
        """
        if self._watch is None:
            return
        model = self._target.model
        with model_lock(model):
            if self._watch.check(model):
                # A layer may have been replaced by its equal: who refers to the old one sees none.
                assert self._fit is not None
                self._set_target(self._target, self._fit.coverage)
                engine = self._structure.engine(self._target, self._fit.coverage)
                self._predictor = self._structure.predictor(engine, self._fit)

    # -- the posterior ---------------------------------------------------------------------

    def _precision(self, *, differentiable: bool = True) -> Any:
        """The posterior precision as the predictor prepares it; kept until something changes.

        Args:
            differentiable: keep the graph of hyper-parameters that require gradients.
        """
        predictor = self.predictor

        def build() -> Any:
            return predictor.precision(self._H_factor, self.prior_precision)

        dependencies = predictor, self.prior_precision, self.sigma_noise, self.temperature
        return self._prepared.get(build, *dependencies, differentiable=differentiable)

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

    # -- prediction ------------------------------------------------------------------------

    __call__ = predicting.predict
    functional_samples = predicting.functional_samples
    predictive_samples = predicting.predictive_samples
    _glm_predictive_distribution = predicting.host_moments

    # -- tuning ----------------------------------------------------------------------------

    def optimize_prior_precision(
        self,
        pred_type: PredType | str = PredType.GLM,
        method: TuningMethod | str | None = None,
        n_steps: int = 100,
        lr: float = 1e-1,
        init_prior_prec: float | Tensor = 1.0,
        prior_structure: PriorStructure | str = PriorStructure.SCALAR,
        val_loader: DataLoader | None = None,
        loss: torchmetrics.Metric | Callable[..., Tensor | float] | None = None,
        log_prior_prec_min: float = -4,
        log_prior_prec_max: float = 4,
        grid_size: int = 100,
        link_approx: LinkApprox | str = LinkApprox.PROBIT,
        n_samples: int = 100,
        verbose: bool = False,
        progress_bar: bool = False,
        log_prior_prec_base: float = 10.0,
        *,
        refine: bool = True,
        seed: int = 0,
    ) -> None:
        """Choose the prior precision on validation data, or by the marginal likelihood.

        A grid search leaves ``tuning_result`` and ``tuned_link_approx``, the link that predictions
        then use; "marglik" leaves None in both. Like the prior precision they stay through a new
        ``fit``, which does not tune: call this again for the new curvature. The search warns where
        its best prior predicts the validation data worse than the MAP model does (by more than
        1e-4 nats per sample): then the posterior costs accuracy of the probabilities.

        Args:
            pred_type: prediction whose loss is compared.
            method: "gridsearch" or "marglik"; None means "gridsearch" with a ``val_loader``, else
                "marglik".
            n_steps: gradient steps of "marglik".
            lr: their step size, on log prior precision.
            init_prior_prec: where "marglik" starts.
            prior_structure: "scalar" or "layerwise" (one entry per covered parameter tensor).
            val_loader: validation data for "gridsearch".
            loss: torchmetrics metric or callable. By default the mean negative log likelihood:
                of the probabilities in classification, of a Gaussian with variance epistemic + σ²
                in regression.
            log_prior_prec_min: exponent of the grid's lower end.
            log_prior_prec_max: exponent of its upper end.
            grid_size: number of grid points.
            link_approx: how probabilities are approximated; remembered for predictions.
            n_samples: draws for "mc" and "nn".
            verbose: print the result.
            progress_bar: show progress.
            log_prior_prec_base: base of the grid's exponents.
            refine: search on between the best grid point's neighbours, at no further pass.
            seed: seed of the draws for "mc" and "nn", the same at every grid point.

        Raises:
            ValueError: for impossible arguments.
            NumericalError: if no grid point has a finite loss. The prior is left as it was.
            ModelChangedError: if the model is no longer the one of the fit.
        """
        self._check_H_init()
        self._check_model()
        pred = checked_pred_type(pred_type)
        result, link = None, None
        if tuning_method(method, val_loader) is TuningMethod.MARGLIK:
            best = by_evidence(
                self._evidence,
                init_prior_prec,
                prior_structure,
                self.mean,
                tuple(parameter.numel() for parameter in self.params),
                takes_diagonal=self._takes_diagonal_prior,
                n_steps=n_steps,
                lr=lr,
                progress_bar=progress_bar,
            )
        else:
            link = checked_link(link_approx, self.likelihood)
            link = LinkApprox.MC if pred is PredType.NN else link
            call = TuningCall(val_loader, pred, link, loss, n_samples, progress_bar, refine, seed)
            grid = PriorGrid(log_prior_prec_min, log_prior_prec_max, grid_size, log_prior_prec_base)
            result = call.search(self._subject(), grid)
            best = torch.as_tensor(result.prior_precision, dtype=torch.float64)
        self.prior_precision = best
        self.tuning_result, self.tuned_link_approx = result, link
        self._warned_about_link = False
        if verbose:
            print(f"Optimized prior precision is {self.prior_precision}.")

    def _subject(self) -> Subject:
        """What a tuning sees of the posterior."""
        sigma = float(torch.as_tensor(self.sigma_noise).detach())
        return Subject(
            self.predictor,
            self.likelihood,
            self._arguments.loss(positions=self._structure.takes_positions),
            torch.as_tensor(self._H_factor).detach(),
            sigma * sigma,
            self._device,
            self._dtype,
            self.dict_key_y,
            self._target.model,
            self._sampled_at,
        )

    def _evidence(self, prior: Tensor) -> Tensor:
        """Log marginal likelihood of a prior precision; the posterior keeps its own."""
        with self._prior_set_to(prior):
            return self.log_marginal_likelihood()

    def _sampled_at(
        self, prior: float, inputs: Any, n_samples: int, generator: torch.Generator
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Prediction of sampled networks under another prior."""
        with self._prior_set_to(torch.tensor(prior, dtype=torch.float64)):
            return self(
                inputs,
                pred_type=PredType.NN,
                n_samples=n_samples,
                generator=generator,
                fitting=True,
            )

    @contextmanager
    def _prior_set_to(self, prior: Tensor) -> Iterator[None]:
        before = self._prior_precision
        try:
            self.prior_precision = prior
            yield
        finally:
            self._prior_precision = before

    # -- files and copies ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a posterior needs beside its model: tensors and plain values only.

        Raises:
            NotFittedError: before ``fit``.
        """
        return state.to_state(self.fitted, self._structure, self._hyper_parameters())

    def load_state_dict(self, state_dict: dict[str, Any], *, check_weights: bool = True) -> None:
        """Restore :meth:`state_dict`.

        Args:
            state_dict: the state.
            check_weights: refuse a model with other weights; False checks names and shapes only.

        Raises:
            ValueError: if it belongs to another class, likelihood, model or set of parameters.
                Nothing is changed then.
        """
        found = state.from_state(
            state_dict,
            self._structure,
            self._target,
            type(self).__name__,
            self.likelihood,
            check_weights=check_weights,
        )
        self._adopt(found.fit, found.model)
        for name, value in found.hyper_parameters.items():
            setattr(self, name, value)

    def _hyper_parameters(self) -> dict[str, Any]:
        """What a state holds beside the fit."""
        return {
            "cls_name": type(self).__name__,
            "likelihood": self.likelihood,
            **{name: getattr(self, name) for name in state.HYPER_PARAMETERS},
        }

    def save(self, path: PathLike) -> None:
        """Write the posterior with all its options to a file; the model is saved by its owner.

        The file holds tensors and plain values only. It is written beside ``path`` first and then
        renamed: a crash leaves the old file or the new one.

        Args:
            path: where to.

        Raises:
            NotFittedError: before ``fit``.
            TypeError: if ``path`` is no path, or an option is neither a tensor nor a plain value.
            OSError: as the file system says.
        """
        saving.write_posterior(
            path, type(self).__name__, self._constructor_arguments(), self.state_dict()
        )

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

        Args:
            path: a file that ``save`` wrote.
            model: the model with the weights that it was fitted with.
            map_location: where the file's tensors are placed first (CPU by default); they end on
                the model's device.
            check_weights: refuse a model with other weights; False checks names and shapes only.

        Raises:
            FileNotFoundError: if there is no such file.
            StoredFileError: if it is damaged, something else, of another class, or too new.
            ValueError: if the model is another one.
        """
        record = saving.read_posterior(path, map_location, cls.__name__)
        return saving.restored(cls, record, model, check_weights=check_weights)

    def _constructor_arguments(self) -> dict[str, Any]:
        """Arguments that construct this posterior's like; what a state holds is not among them."""
        own = {"temperature": self.temperature, "enable_backprop": self.enable_backprop}
        return saving.constructor_arguments(self._arguments, self._target) | own

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self._constructor_arguments()
        if self._fit is not None:
            return saving.rebuilt, (type(self), self._target.model, arguments, self.state_dict())
        start = {
            "prior_precision": self.prior_precision,
            "prior_mean": self.prior_mean,
            "sigma_noise": self.sigma_noise,
        }
        return saving.unfitted, (type(self), self._target.model, start | arguments)
