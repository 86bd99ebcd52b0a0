r"""Scales and shifts of normalisations.

A norm's output is x̂ ⊙ w + b, with x̂ the normalised input. The gradients Σ_t g ⊙ x̂ in w and
Σ_t g in b are small, so that their blocks are exact (see ``VectorRows``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from laplace_debiased.curvature.operations.call import OperationCall, Reading, RuleDefaults
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.parameters import VectorRows


@dataclass(frozen=True, eq=False)
class Normalisation:
    """What a norm does before it scales: other arguments of its function, and number of scales."""

    others: dict[str, Any]
    size: int


class NormRule(RuleDefaults):
    """Rows of x̂ ⊙ w + b: columns times x̂ for the scale, as they are for the shift.

    Args:
        function: torch's; without scale and shift it gives x̂.
        channels: whether scales are per channel, at dimension 1, and not per entry of the last
            dimensions.
    """

    def __init__(self, function: Callable[..., Tensor], *, channels: bool) -> None:
        self._function, self._channels = function, channels
        self._signature = inspect.signature(function)

    def readings(self, *args: Any, **kwargs: Any) -> tuple[Reading, ...]:
        others = dict(self._signature.bind(*args, **kwargs).arguments)
        images = others.pop("input")
        parameters = {slot: others.pop(slot, None) for slot in ("weight", "bias")}
        sizes = [value.numel() for value in parameters.values() if value is not None]
        if not sizes:
            return ()
        refused = None
        if self._function is functional.batch_norm:
            statistics = others["running_mean"], others["running_var"]
            if others.get("training") or any(value is None for value in statistics):
                refused = "a batch norm without running statistics mixes the samples"
        return (Reading(parameters, (images,), Normalisation(others, sizes[0]), refused),)

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> None:
        """Scales and shifts are vectors."""

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Inputs [m, ...], columns [m, R, ...] of the same shape."""
        norm: Normalisation = call.settings
        (inputs,), values = call.inputs, columns[0]
        flat = call.flat(inputs)
        if self._channels and (flat.ndim < 2 or flat.shape[1] != norm.size):
            raise ValueError(f"{call.operation} got an input without a batch dimension.")
        if slot == "weight":
            # Running statistics may be of a coarser dtype than what is read.
            others = {k: v.to(flat) if isinstance(v, Tensor) else v for k, v in norm.others.items()}
            normalised = self._function(flat, **others)
            values = values * normalised.reshape(inputs.shape).unsqueeze(1)
        m, n_columns = values.shape[:2]
        if not self._channels:
            return VectorRows(values.reshape(m, n_columns, -1, norm.size).sum(2))
        if call.folded:
            values = values.movedim(2, 3)
        return VectorRows(values.flatten(3).sum(3) if values.ndim > 3 else values)


RULES: dict[Any, NormRule] = {
    **{f: NormRule(f, channels=False) for f in (functional.layer_norm, functional.rms_norm)},
    **{
        f: NormRule(f, channels=True)
        for f in (functional.group_norm, functional.batch_norm, functional.instance_norm)
    },
}
