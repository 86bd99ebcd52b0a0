"""The debiased posteriors over the last layer, laplace-torch ``LLLaplace`` posteriors."""

from __future__ import annotations

from typing import Any

from laplace.curvature.curvature import CurvatureInterface
from laplace.lllaplace import KronLLLaplace, LLLaplace
from laplace.utils.feature_extractor import FeatureReduction
from torch import Tensor, nn

from laplace_debiased.estimation import LastLayer, Target
from laplace_debiased.estimation.keywords import backend_from
from laplace_debiased.network.last_layer import check_last_layer_name
from laplace_debiased.options import parse_choice
from laplace_debiased.posterior.kron import DebiasedKronLaplace
from laplace_debiased.posterior.lowrank import DebiasedLowRankLaplace


def last_layer_target(
    model: nn.Module, name: str | None, reduction: FeatureReduction | str | None
) -> Target:
    """The last layer of a model as a target.

    Raises:
        TypeError: for a model that is no module.
        ValueError: for a name of no linear layer, or an unknown reduction.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    check_last_layer_name(model, name)
    chosen = None
    if reduction is not None:
        chosen = parse_choice(FeatureReduction, reduction, "feature_reduction")
    return Target(model, LastLayer(name, chosen, is_given=name is not None))


class DebiasedKronLLLaplace(DebiasedKronLaplace, KronLLLaplace):
    """Kronecker posterior over the last layer, whose predictive needs no Jacobian.

    It works on the user's own network, without a hook in it. The last layer is the one
    that ``last_layer_name`` says, or is found by one forward pass at every ``fit``. Everything else
    is as in :class:`DebiasedKronLaplace`; magnitudes of the last layer need no backward pass, and
    in classification (with ``fisher="type2"``) C² operations per sample.

    Args:
        model: trained network with a linear last layer; never changed.
        likelihood: as in :class:`DebiasedKronLaplace`.
        feature_reduction: how features of more than two dimensions are reduced, as the model does:
            "pick_first", "pick_last" or "average".
        last_layer_name: qualified name of the last layer; found at every fit by default.
        **kwargs: as in :class:`DebiasedKronLaplace`.

    Raises:
        ValueError: for options that are unknown, out of range or contradictory.
    """

    _key = ("last_layer", "debiased_kron")

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
        self._construct(
            last_layer_target(model, last_layer_name, feature_reduction),
            likelihood,
            options,
            backend=backend_from(backend, backend_kwargs, None),
            dict_keys=(dict_key_x, dict_key_y),
            sigma_noise=sigma_noise,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            enable_backprop=enable_backprop,
            damping=damping,
        )


class DebiasedLowRankLLLaplace(DebiasedLowRankLaplace, LLLaplace):
    """Low-rank posterior over the last layer, whose rows need no backward pass.

    Everything else is as in :class:`DebiasedLowRankLaplace` and :class:`DebiasedKronLLLaplace`.

    Args:
        model: trained network with a linear last layer; never changed.
        likelihood: as in :class:`DebiasedLowRankLaplace`.
        feature_reduction: how features of more than two dimensions are reduced, as the model does:
            "pick_first", "pick_last" or "average".
        last_layer_name: qualified name of the last layer; found at every fit by default.
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
        backend: type[CurvatureInterface] | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._construct(
            last_layer_target(model, last_layer_name, feature_reduction),
            likelihood,
            options,
            backend=backend_from(backend, backend_kwargs, None),
            dict_keys=(dict_key_x, dict_key_y),
            sigma_noise=sigma_noise,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            enable_backprop=enable_backprop,
        )
