"""The one entry of a mapping that a network takes, where it takes no mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.inputs import call_arguments, invoke, select_rows, to_device
from laplace_debiased.network.modes import undisturbed
from laplace_debiased.network.precision import exact_arithmetic


class OneEntry:
    """Gives a network ``batch[key]`` of a mapping, if it takes that and no mapping.

    A signature does not tell ``forward(self, x)`` that takes an image from one that reads
    ``x["image"]``, as laplace-torch has it. So two samples of the first mapping are tried, whole
    and then their entry, and what the network takes is what it is given from then on.

    Args:
        model: the network.
        key: of the entry.
    """

    def __init__(self, model: nn.Module, key: Any) -> None:
        self._model, self._key = model, key
        self._is_taken: bool | None = None

    def __call__(self, inputs: Any) -> Any:
        """What the network takes of its inputs; all of them, where it takes neither."""
        if not isinstance(inputs, Mapping) or self._key not in inputs:
            return inputs
        if call_arguments(self._model, inputs)[1]:  # entries by name
            return inputs
        if self._is_taken is None:
            sample = select_rows(inputs, slice(0, 2))
            if self._takes(sample):
                self._is_taken = False
            elif self._takes(sample[self._key]):
                self._is_taken = True
        return inputs[self._key] if self._is_taken else inputs

    def _takes(self, inputs: Any) -> bool:
        device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
        with undisturbed(self._model), exact_arithmetic(device), torch.no_grad():
            try:
                return isinstance(invoke(self._model, to_device(inputs, device)), Tensor)
            except ModelCallError:
                return False
