"""``DebiasedLaplace(model)``: from structure and subset of weights to the posterior's class."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_debiased.options import HessianStructure, SubsetOfWeights, parse_choice
from laplace_debiased.posterior import (
    DebiasedKronLaplace,
    DebiasedKronLLLaplace,
    DebiasedLowRankLaplace,
    DebiasedLowRankLLLaplace,
)

_CLASSES: dict[tuple[SubsetOfWeights, HessianStructure], type] = {
    (SubsetOfWeights.ALL, HessianStructure.KRON): DebiasedKronLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.KRON): DebiasedKronLLLaplace,
    (SubsetOfWeights.ALL, HessianStructure.LOWRANK): DebiasedLowRankLaplace,
    (SubsetOfWeights.LAST_LAYER, HessianStructure.LOWRANK): DebiasedLowRankLLLaplace,
}


class DebiasedLaplace:
    """Debiased Laplace posterior of a trained network.

    Calling it gives an instance of the class that fits the arguments:

    =================  =================  ==========================
    subset_of_weights  hessian_structure  class
    =================  =================  ==========================
    "all"              "kron"             ``DebiasedKronLaplace``
    "last_layer"       "kron"             ``DebiasedKronLLLaplace``
    "all"              "lowrank"          ``DebiasedLowRankLaplace``
    "last_layer"       "lowrank"          ``DebiasedLowRankLLLaplace``
    =================  =================  ==========================

    Args:
        model: trained network; never changed.
        likelihood: "classification" or "regression".
        subset_of_weights: "all" or "last_layer".
        hessian_structure: "kron" or "lowrank".
        **kwargs: of the class: laplace-torch's own (``prior_precision``, ``sigma_noise``,
            ``temperature``, ``backend``, ...), and ``scheme``, ``magnitudes``, ``sampling``,
            ``fisher``, ``mc_samples``, ``rank``, ``strict``, ...

    Raises:
        ValueError: for an unknown structure or subset, and as the class says.
    """

    def __new__(
        cls,
        model: nn.Module,
        likelihood: str = "classification",
        subset_of_weights: SubsetOfWeights | str = SubsetOfWeights.ALL,
        hessian_structure: HessianStructure | str = HessianStructure.KRON,
        **kwargs: Any,
    ) -> Any:
        """Dispatch to the posterior's class."""
        subset = parse_choice(SubsetOfWeights, subset_of_weights, "subset_of_weights")
        structure = parse_choice(HessianStructure, hessian_structure, "hessian_structure")
        chosen = _CLASSES.get((subset, structure))
        if chosen is None:
            raise ValueError(
                f"subset_of_weights={subset.value!r} with hessian_structure={structure.value!r} "
                "is not available."
            )
        return chosen(model, likelihood, **kwargs)
