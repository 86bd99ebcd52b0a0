"""The debiased Kronecker posterior over the last layer, a laplace-torch ``KronLLLaplace``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from laplace.curvature.curvature import CurvatureInterface
from laplace.lllaplace import KronLLLaplace
from laplace.utils.feature_extractor import FeatureExtractor, FeatureReduction
from torch import Tensor, nn

from laplace_debiased.curvature import Coverage, CurvaturePass, FeaturePass, Layer, rule_for
from laplace_debiased.curvature.coverage import FROZEN, NOT_LAST
from laplace_debiased.data import CurvaturePlan
from laplace_debiased.estimation.backends import check_backend
from laplace_debiased.estimation.budget import RECOMMENDED_LAST_LAYER_SAMPLES
from laplace_debiased.estimation.checkpoint import FitCheckpoint
from laplace_debiased.estimation.fitting import FirstWalk, FitRequest, FittedKron
from laplace_debiased.estimation.kron_estimator import KronEstimator
from laplace_debiased.estimation.softmax_head import in_closed_form
from laplace_debiased.estimation.walking import first_inputs_of_loader, first_inputs_of_plan
from laplace_debiased.network.inputs import calling_by_signature, select_rows, to_device
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.outputs import check_last_layer_name
from laplace_debiased.options import CurvatureOptions
from laplace_debiased.posterior.base import DebiasedPosterior, Inputs
from laplace_debiased.posterior.configure import Settings, settings_from, with_noise
from laplace_debiased.posterior.kron_base import KronPosterior
from laplace_debiased.posterior.original import Original
from laplace_debiased.posterior.priors import check_prior_length
from laplace_debiased.predictive import OutputCovariance, last_layer_moments, last_layer_sweep


class LastLayerPosterior(DebiasedPosterior):
    """What last-layer posteriors share: which layer it is, its features, its sampled outputs."""

    model: Any  # laplace-torch's FeatureExtractor: its attributes are set past nn.Module's typing
    _settings: Settings
    _static_coverage: Coverage
    _original: Original

    @property
    def _covered_model(self) -> nn.Module:
        return self.model.model

    # -- the user's network ----------------------------------------------------------------

    @contextmanager
    def _at_present_weights(self) -> Iterator[None]:
        """Work on a new copy where the user's network has changed; all as before on failure."""
        before = dict(vars(self))
        try:
            if self._original.differs_from(self._covered_model):
                self._copy_anew()
            yield
        except BaseException:
            if self.model is not before["model"]:
                for name in vars(self).keys() - before.keys():
                    delattr(self, name)
                for name, value in before.items():
                    object.__setattr__(self, name, value)
            raise

    def _copy_anew(self) -> None:
        """A new extractor around a new copy; what is covered stays as it was chosen."""
        own = self._original.copied()
        requires_grad = {
            name: p.requires_grad for name, p in self._covered_model.named_parameters()
        }
        for name, parameter in own.named_parameters():
            parameter.requires_grad_(requires_grad.get(name, parameter.requires_grad))
        check_last_layer_name(own, self._last_layer_name)
        self.model = FeatureExtractor(
            own,
            # One that was found is looked for again.
            last_layer_name=self._last_layer_name,
            enable_backprop=self.model.enable_backprop,
            feature_reduction=self.model.feature_reduction,
        )
        if self._last_layer_name is not None:
            self._static_coverage = self._last_layer_coverage()
        for name in ("_prior_precision", "_prior_mean", "_sigma_noise"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(self._device, self._dtype))

    def _check_model(self) -> None:
        super()._check_model()
        if self._watch is not None:
            self._original.check(self._covered_model, self._watch.reference)

    # -- which layer -----------------------------------------------------------------------

    def _last_layer_coverage(self) -> Coverage:
        """The last layer's trainable parameters, and nothing else.

        Raises:
            CoverageError: if the last layer is frozen.
        """
        last = {id(parameter) for parameter in self.model.last_layer.parameters()}
        covered, excluded, sizes = [], {}, {}
        for name, parameter in self._covered_model.named_parameters():
            sizes[name] = parameter.numel()
            if id(parameter) not in last:
                excluded[name] = NOT_LAST
            elif not parameter.requires_grad:
                excluded[name] = FROZEN
            else:
                covered.append(name)
        coverage = Coverage(tuple(covered), MappingProxyType(excluded), MappingProxyType(sizes))
        coverage.require(strict=self._settings.strict)
        return coverage

    def _candidates(self, request: FitRequest) -> Coverage:
        """Find the last layer, if it is not known yet, from one sample of the loader."""
        if self.model.last_layer is None:
            inputs = first_inputs_of_loader(request.train_loader, self.dict_key_y)
            self.model.set_last_layer(self._find_last_layer_name(inputs))
            coverage = self._last_layer_coverage()
            if self._settings.backend is not None:
                check_backend(self._settings.backend, self._covered_model, coverage)
            self._static_coverage = coverage
        return self._static_coverage

    def _find_last_layer_name(self, inputs: Inputs) -> str:
        # On a copy: a search that fails leaves its hooks behind.
        probe = FeatureExtractor(copy.deepcopy(self._covered_model))
        sample = select_rows(to_device(inputs, self._device), slice(0, 1))
        with torch.no_grad(), evaluation_mode(probe), calling_by_signature(probe.model):
            probe.find_last_layer(sample)
        return probe._last_layer_name

    def _feature_pass(self, coverage: Coverage) -> FeaturePass:
        """The pass over the last layer alone."""
        name, module = self.model._last_layer_name, self.model.last_layer
        covered = frozenset(coverage.covered)
        weight, bias = (
            candidate if (candidate := f"{name}.{attribute}") in covered else None
            for attribute in ("weight", "bias")
        )
        # A subclass of nn.Linear is one too; on the meta device none draws initial weights.
        rule = rule_for(nn.Linear(1, 1, device="meta"))
        assert rule is not None
        layer = Layer(name, module, rule, weight, bias)
        return FeaturePass(self.model, layer, self._settings.options.byte_budget)

    def _nn_functional_samples(
        self,
        X: Inputs,
        n_samples: int = 100,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """Outputs [n_samples, m, C] of sampled last layers on features of one forward pass."""
        if model_kwargs:
            raise ValueError("last-layer sampling takes no further model arguments.")
        feature_pass = self._feature_pass(self.coverage)
        features = feature_pass.features(X, differentiable=self.enable_backprop)[1]
        samples = self.sample(n_samples, generator)
        layer, sizes = feature_pass.layer, [parameter.numel() for parameter in self.params]
        values = dict(zip(self.coverage.covered, samples.split(sizes, dim=-1), strict=True))
        linear: Any = layer.module
        weight, bias = linear.weight.detach(), linear.bias
        if layer.weight is not None:
            weight = values[layer.weight].reshape(n_samples, *weight.shape)
        outputs = features @ weight.transpose(-1, -2)
        if bias is not None:
            shift = bias.detach() if layer.bias is None else values[layer.bias].unsqueeze(1)
            outputs = outputs + shift
        return outputs.expand(n_samples, -1, -1)

    @property
    def prior_precision_diag(self) -> Tensor:
        """Prior precision of every covered entry [P]; per-layer priors too, unlike the host's."""
        prior = self.prior_precision.to(self.mean)
        if len(prior) == 1:
            return prior.expand(self.n_params)
        if len(prior) == self.n_params:
            return prior
        sizes = torch.tensor([parameter.numel() for parameter in self.params], device=prior.device)
        return prior.repeat_interleave(sizes)

    # -- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As over all weights, with the last layer's name."""
        return super().state_dict() | {"last_layer_name": self.model._last_layer_name}

    def load_state_dict(self, state_dict: dict[str, Any], *, check_weights: bool = True) -> None:
        """As over all weights; finds the last layer by its name."""
        with self._at_present_weights():
            name = state_dict.get("last_layer_name")
            modules = dict(self._covered_model.named_modules())
            if not isinstance(modules.get(str(name)), nn.Linear):
                raise ValueError(f"the model has no linear layer {name!r}, which the state covers.")
            if self.model.last_layer is None:
                self.model.set_last_layer(name)
                self._static_coverage = self._last_layer_coverage()
            elif self.model._last_layer_name != name:
                raise ValueError(
                    f"the state is for the last layer {name!r}, this posterior for "
                    f"{self.model._last_layer_name!r}."
                )
            super().load_state_dict(state_dict, check_weights=check_weights)

    def _own_model(self) -> nn.Module:
        """A copy without the extractor's hook, which would write to this posterior's features."""
        name = self.model._last_layer_name if self.model.last_layer is not None else None
        with model_lock(self.model):
            if name is None:
                return copy.deepcopy(self._covered_model)
            hooks = self.model.last_layer._forward_hooks
            own = {
                key: hook
                for key, hook in hooks.items()
                if getattr(hook, "__module__", None) == FeatureExtractor.__module__
            }
            for key in own:
                del hooks[key]
            try:
                return copy.deepcopy(self._covered_model)
            finally:
                hooks.update(own)


class DebiasedKronLLLaplace(LastLayerPosterior, KronPosterior, KronLLLaplace):
    """Kronecker posterior over the last layer, whose predictive needs no Jacobian.

    The network is copied, as laplace-torch does, and copied again by a ``fit`` that finds it
    changed; until then, predictions raise ModelChangedError. The last layer is found by its feature
    extractor: by name, or by one forward pass at the first ``fit``. Everything else is as in
    :class:`DebiasedKronLaplace`; magnitudes of the last layer need no backward pass, and in
    classification (with ``fisher="type2"``) C² operations per sample.

    Args:
        model: trained network with a linear last layer; never changed.
        likelihood: as in :class:`DebiasedKronLaplace`.
        feature_reduction: how features of more than two dimensions are reduced, as the model does:
            "pick_first", "pick_last" or "average".
        last_layer_name: qualified name of the last layer; found at the first fit by default.
        **kwargs: as in :class:`DebiasedKronLaplace`.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
    """

    _key = ("last_layer", "debiased_kron")
    _recommended_samples = RECOMMENDED_LAST_LAYER_SAMPLES

    _pass: FeaturePass

    def __init__(
        self,
        model: nn.Module,
        likelihood: str = "classification",
        sigma_noise: float | Tensor | str = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        last_layer_name: str | None = None,
        damping: bool = False,
        backend_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        settings = settings_from(model, likelihood, backend, backend_kwargs, damping, options)
        settings, sigma_noise = with_noise(settings, sigma_noise)
        check_last_layer_name(model, last_layer_name)
        # The model is copied here; what is copied in inference mode stays without gradients.
        with torch.inference_mode(False):
            KronLLLaplace.__init__(
                self,
                model,
                settings.host_likelihood,
                temperature=temperature,
                enable_backprop=enable_backprop,
                feature_reduction=feature_reduction,
                dict_key_x=dict_key_x,
                dict_key_y=dict_key_y,
                backend=backend,
                last_layer_name=last_layer_name,
                backend_kwargs=backend_kwargs,
            )
        self._original = Original(model)
        self._settings = settings
        self.likelihood = settings.likelihood
        self._fitted: FittedKron | None = None
        self.H = None
        self.sigma_noise = sigma_noise
        if self.model.last_layer is not None:
            self._configure(settings, self._last_layer_coverage())
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean

    def _inspected_coverage(self, plan: CurvaturePlan) -> Coverage:
        coverage = self._static_coverage
        check_prior_length(self._prior_precision, coverage.covered, coverage.n_covered)
        if self._settings.backend is not None:
            # A backend differentiates the whole network, and would not see that its outputs are
            # not the last layer's; our own pass checks every batch.
            self._feature_pass(coverage).outputs(first_inputs_of_plan(plan))
        return coverage

    def _make_pass(self, coverage: Coverage) -> FeaturePass:
        return self._feature_pass(coverage)

    def _walks(
        self,
        curvature_pass: CurvaturePass,
        coverage: Coverage,
        options: CurvatureOptions,
        request: FitRequest,
        kept: FitCheckpoint | None,
    ) -> tuple[FirstWalk, KronEstimator | None]:
        walk, estimator = super()._walks(curvature_pass, coverage, options, request, kept)
        return in_closed_form(walk), in_closed_form(estimator)

    def _isolated_model(self, coverage: Coverage) -> FeatureExtractor:
        """A new extractor around a copy: a copied one would write to the old one's features."""
        inner = copy.deepcopy(self._covered_model).eval()
        extractor = FeatureExtractor(
            inner,
            last_layer_name=self.model._last_layer_name,
            feature_reduction=self.model.feature_reduction,
        )
        last = {id(parameter) for parameter in extractor.last_layer.parameters()}
        for parameter in inner.parameters():
            parameter.requires_grad_(id(parameter) in last)
        return extractor.eval()

    # -- prediction ------------------------------------------------------------------------

    def _moments(self, inputs: Inputs, covariance: OutputCovariance) -> tuple[Tensor, Tensor]:
        return last_layer_moments(
            self._pass, self._blocks(), inputs, covariance, differentiable=self.enable_backprop
        )

    def _sweep(self, inputs: Inputs, priors: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
        return last_layer_sweep(
            self._pass, self._likelihood_blocks(), priors, inputs, diagonal=diagonal
        )
