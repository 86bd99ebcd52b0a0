"""A sample and what a network gives for it: still, and alone as in a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.inputs import (
    batch_length,
    invoke,
    map_tensors,
    select_rows,
    to_device,
)
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.outputs import largest_difference
from laplace_debiased.network.precision import exact_arithmetic

_BATCH = 16
"""Samples of the batch that a sample is looked at in: some networks mix only many."""


@dataclass(frozen=True, eq=False)
class Probe:
    """One sample of a fit, and the network's outputs at its weights.

    Attributes:
        inputs: of the sample.
        outputs: [1, ...].
    """

    inputs: Any
    outputs: Tensor

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, *, may_mix: bool) -> Probe | None:
        """Run the first sample of a batch alone, and in the batch.

        Args:
            model: the network.
            inputs: a batch's.
            may_mix: whether it is known, and taken care of, that its samples depend on each other.

        Returns:
            The sample alone; None of a network that takes no batch of one.

        Raises:
            ValueError: if its outputs depend on what else is in the batch.
        """
        try:
            sample = select_rows(inputs, slice(0, 1))
            alone = _outputs(model, sample)
            size = min(_BATCH, batch_length(inputs))
            batch = None if may_mix else _outputs(model, select_rows(inputs, slice(0, size)))
        except ModelCallError:
            return None
        if batch is not None and batch.shape[1:] == alone.shape[1:]:
            difference = largest_difference(batch[:1], alone)
            if difference is not None:
                raise ValueError(
                    f"the outputs of a sample change by {difference:.2g} when {size - 1} others "
                    "are in its batch, in evaluation mode: the model mixes the samples of a batch, "
                    "so that there is no curvature of one. Use statistics kept from training, or "
                    "of each sample alone."
                )
        # A view would keep the batch, and see what its owner writes to it.
        return cls(map_tensors(lambda tensor: tensor.detach().clone(), sample), alone)

    def difference(self, model: nn.Module) -> float | None:
        """How far the network's outputs are from what they were; None within round-off."""
        now = _outputs(model, self.inputs).to(self.outputs)
        if now.shape != self.outputs.shape:
            return float("inf")
        return largest_difference(now, self.outputs)


def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with evaluation_mode(model), exact_arithmetic(device), torch.no_grad():
        outputs = invoke(model, to_device(inputs, device))
    return outputs.detach()
