"""``DebiasedLaplace(model)``: from structure and subset of weights to the posterior's class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from laplace_debiased.files import PathLike
from laplace_debiased.options import HessianStructure, SubsetOfWeights, parse_choice
from laplace_debiased.posterior import (
    DebiasedKronLaplace,
    DebiasedKronLLLaplace,
    DebiasedLowRankLaplace,
    DebiasedLowRankLLLaplace,
)
from laplace_debiased.posterior.saving import loaded

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
        likelihood: "classification", "regression", "bernoulli" or "reward_modeling".
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
        return _CLASSES[subset, structure](model, likelihood, **kwargs)

    @classmethod
    def load(
        cls,
        path: PathLike,
        model: nn.Module,
        *,
        map_location: torch.device | str | None = None,
        check_weights: bool = True,
    ) -> Any:
        """Read a posterior that ``la.save(path)`` wrote, with all its options.

        Args:
            path: the file.
            model: the model with the weights that the posterior was fitted with.
            map_location: where the file's tensors are placed first (CPU by default); they end on
                the model's device.
            check_weights: refuse a model with other weights; False checks names and shapes only.

        Returns:
            The posterior, of the class that was saved.

        Raises:
            FileNotFoundError: if there is no such file.
            StoredFileError: if it is damaged, something else, or too new.
            ValueError: if the model is another one.
        """
        kinds: Iterable[type] = _CLASSES.values()
        return loaded(kinds, path, model, map_location, check_weights=check_weights)
