"""The debiased posteriors over the last layer, laplace-torch ``LLLaplace`` posteriors."""

from __future__ import annotations

from typing import Any

from laplace.lllaplace import KronLLLaplace, LLLaplace
from laplace.utils.feature_extractor import FeatureReduction
from torch import nn

from laplace_debiased.estimation import LastLayer, Target
from laplace_debiased.network.last_layer import check_last_layer_name
from laplace_debiased.network.outputs import checked_model
from laplace_debiased.network.wrappers import own_name, plain_network
from laplace_debiased.options import parse_choice
from laplace_debiased.posterior.kron import DebiasedKronLaplace
from laplace_debiased.posterior.lowrank import DebiasedLowRankLaplace


def last_layer_target(model: nn.Module, options: dict[str, Any]) -> Target:
    """The last layer of a model as a target; takes the options that say which out of the others."""
    name, reduction = options.pop("last_layer_name", None), options.pop("feature_reduction", None)
    if reduction is not None:
        reduction = parse_choice(FeatureReduction, reduction, "feature_reduction")
    model = plain_network(checked_model(model))
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
