"""The debiased low-rank posterior over the last layer, a laplace-torch ``LLLaplace``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from laplace.baselaplace import LowRankLaplace, ParametricLaplace
from laplace.lllaplace import LLLaplace
from laplace.utils.feature_extractor import FeatureExtractor, FeatureReduction
from torch import Tensor, nn

from laplace_debiased.curvature import Coverage
from laplace_debiased.curvature.lowrank import FeatureRowPass, RowPass
from laplace_debiased.estimation.fitting import FitRequest
from laplace_debiased.network.functional import FunctionalNetwork
from laplace_debiased.network.outputs import check_last_layer_name
from laplace_debiased.posterior.configure import with_noise
from laplace_debiased.posterior.last_layer import LastLayerPosterior
from laplace_debiased.posterior.lowrank import low_rank_settings
from laplace_debiased.posterior.lowrank_base import LowRankPosterior
from laplace_debiased.posterior.original import Original


class DebiasedLowRankLLLaplace(LastLayerPosterior, LowRankPosterior, LLLaplace, LowRankLaplace):
    """Low-rank posterior over the last layer, whose rows need no backward pass.

    The network is copied, as laplace-torch does, and copied again by a ``fit`` that finds it
    changed; until then, predictions raise ModelChangedError. The last layer is found by its feature
    extractor: by name, or by one forward pass at the first ``fit``. Everything else is as in
    :class:`DebiasedLowRankLaplace`.

    Args:
        model: trained network with a linear last layer; never changed.
        likelihood: as in :class:`DebiasedLowRankLaplace`.
        feature_reduction: how features of more than two dimensions are reduced, as the model does:
            "pick_first", "pick_last" or "average".
        last_layer_name: qualified name of the last layer; found at the first fit by default.
        **kwargs: as in :class:`DebiasedLowRankLaplace`.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
    """

    _key = ("last_layer", "debiased_lowrank")

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
        backend: None = None,
        last_layer_name: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        settings = low_rank_settings(model, likelihood, backend, backend_kwargs, options)
        settings, sigma_noise = with_noise(settings, sigma_noise)
        check_last_layer_name(model, last_layer_name)
        # LLLaplace's own constructor leads to LowRankLaplace's, which asks for a package that no
        # plain install has.
        ParametricLaplace.__init__(
            self,
            model,
            settings.host_likelihood,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
        )
        with torch.inference_mode(False):  # what is copied in that mode stays without gradients
            own = copy.deepcopy(model)
        self.model = FeatureExtractor(
            own,
            last_layer_name=last_layer_name,
            enable_backprop=enable_backprop,
            feature_reduction=feature_reduction,
        )
        self._last_layer_name = last_layer_name
        self._original = Original(model)
        self._settings = settings
        self.likelihood = settings.likelihood
        self._fitted = None
        self.sigma_noise = sigma_noise
        if self.model.last_layer is not None:
            self._configure(settings, self._last_layer_coverage())
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean

    @contextmanager
    def _at_present_weights(self) -> Iterator[None]:
        try:
            with super()._at_present_weights():
                yield
        finally:
            # What the extractor kept of curvature products is a tensor of a finished transform.
            self.model._features.clear()

    def _candidates(self, request: FitRequest) -> Coverage:
        known = self.model.last_layer is not None
        coverage = LastLayerPosterior._candidates(self, request)
        if not known:
            self._configure(self._settings, coverage)
            self.prior_precision = self._prior_precision
        return coverage

    def _make_pass(self, coverage: Coverage) -> RowPass:
        return FeatureRowPass(
            network=FunctionalNetwork(self._covered_model, coverage.covered),
            byte_budget=self._settings.options.byte_budget,
            feature_pass=self._feature_pass(coverage),
        )
