"""A sample and what a network gives for it: still, and alone as in a batch; and one for files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.errors import ModelCallError
from laplace_debiased.network.inputs import (
    batch_length,
    invoke,
    map_tensors,
    plain_containers,
    select_rows,
    tensors_of,
    to_device,
)
from laplace_debiased.network.memory import is_out_of_memory
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.outputs import checked_tensor, largest_difference
from laplace_debiased.network.precision import exact_arithmetic

_BATCH = 16
"""Samples of the batch that a sample is looked at in: some networks mix only many."""


@dataclass(frozen=True, eq=False)
class Probe:
    """One sample of a fit, and the network's outputs at its weights.

    Attributes:
        inputs: of the sample.
        outputs: [1, ...].
        is_made_up: whether the sample was drawn, and belongs to nobody.
        made_up: a sample that was, beside one of the data; None where the network takes none.
    """

    inputs: Any
    outputs: Tensor
    is_made_up: bool = False
    made_up: Probe | None = None

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, *, may_mix: bool) -> Probe | None:
        """Run the first and the last sample of a batch alone, and in the batch.

        ``may_mix`` says that samples are known to depend on each other; else that is a
        ValueError. Returns the sample alone; None of a network that takes no batch of one.
        """
        try:
            sample = select_rows(inputs, slice(0, 1))
            alone = _outputs(model, sample)
            if not may_mix and alone.ndim:
                _check_apart(model, inputs, alone)
        except ModelCallError:
            return None
        # A view would keep the batch, and see what its owner writes to it.
        kept = map_tensors(lambda tensor: tensor.detach().clone(), sample)
        return cls(kept, alone, made_up=cls.drawn(model, inputs))

    @classmethod
    def drawn(cls, model: nn.Module, inputs: Any) -> Probe | None:
        """Run a sample that is like those of a batch and none of them: a file may hold it.

        None where none can be drawn, or the network refuses it.
        """
        try:
            sample = _made_up(inputs, _device(model))
            outputs = None if sample is None else _outputs(model, sample)
        except Exception as error:  # whatever a user's code raises on what it was not made for
            if is_out_of_memory(error):
                raise
            return None
        if outputs is None or not bool(torch.isfinite(outputs).all()):
            return None
        return cls(sample, outputs, is_made_up=True)

    @property
    def for_file(self) -> Probe | None:
        """The one without data of the fit."""
        return self if self.is_made_up else self.made_up

    def change(self, model: nn.Module) -> str | None:
        """How far the network's outputs are from what they were; None within round-off."""
        name = "a made-up sample" if self.is_made_up else "a sample of the fit"
        try:
            now = _outputs(model, self.inputs).to(self.outputs)
        except ModelCallError as error:
            if not self.is_made_up:
                raise
            return f"at equal weights it fails on {name} that it took before ({error})"
        same = now.shape == self.outputs.shape
        difference = largest_difference(now, self.outputs) if same else float("inf")
        if difference is None:
            return None
        return (
            f"at equal weights its outputs for {name} differ by {difference:.2g} "
            "(a hook, a function or an attribute is another)"
        )


def _check_apart(model: nn.Module, inputs: Any, first: Tensor) -> None:
    """Check that the samples at both ends of a batch have the outputs that they have alone.

    Both, since a model may mix one end in with the others.
    """
    size = min(_BATCH, batch_length(inputs))
    batch = _outputs(model, select_rows(inputs, slice(0, size)))
    last = _outputs(model, select_rows(inputs, slice(size - 1, size)))
    for together, alone in ((batch[:1], first), (batch[-1:], last)):
        same = together.shape == alone.shape
        difference = largest_difference(together, alone) if same else None
        if difference is not None:
            raise ValueError(
                f"the outputs of a sample change by {difference:.2g} when {size - 1} others "
                "are in its batch, in evaluation mode: the model mixes the samples of a batch, "
                "so that there is no curvature of one. Use statistics kept from training, or "
                "of each sample alone."
            )


_FEW = 16
"""Entries of a tensor, below which its mean and deviation would say what they are."""


def _made_up(inputs: Any, device: torch.device) -> Any | None:
    """A sample in plain containers, drawn with a fixed seed in the likeness of a batch.

    Real entries are normal with the mean and deviation of all entries of the batch's first
    samples. Integers are all their smallest one, flags all their largest: valid, and of nobody.
    None if the inputs hold more than tensors, or if an index out of range could come of it where
    that ends the process's use of the device.
    """
    rows = select_rows(inputs, slice(0, min(_BATCH, batch_length(inputs))))
    if not _is_plain(rows):
        return None
    if device.type != "cpu" and any(map(_may_index, tensors_of(rows))):
        return None
    generator = torch.Generator().manual_seed(0)

    def drawn(tensor: Tensor) -> Tensor:
        values = tensor.detach().cpu()
        if not values.is_floating_point():
            one = values.max()
            return torch.full_like(values, int(one if one <= 1 else values.min()))
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64)
        if values.numel() < _FEW:
            return noise.to(values.dtype)
        known = values.double()
        return (known.mean() + known.std() * noise).to(values.dtype)

    sample = select_rows(map_tensors(drawn, plain_containers(rows)), slice(0, 1))
    return map_tensors(Tensor.clone, sample)  # a view would keep, and a file hold, the batch


def _may_index(tensor: Tensor) -> bool:
    """Whether entries may be made indices by the network, which made-up ones could exceed."""
    if tensor.is_floating_point():
        return bool((tensor == tensor.round()).all(0).any())
    return bool((tensor < 0).any())


def _is_plain(inputs: Any) -> bool:
    """Whether inputs hold tensors alone: what is none might be somebody's, a text say."""
    match inputs:
        case Mapping():
            return all(isinstance(key, str) and _is_plain(v) for key, v in inputs.items())
        case tuple() | list():
            return all(map(_is_plain, inputs))
    return inputs is None or (isinstance(inputs, Tensor) and inputs.numel() > 0)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _outputs(model: nn.Module, inputs: Any) -> Tensor:
    device = _device(model)
    with evaluation_mode(model), exact_arithmetic(device), torch.no_grad():
        outputs = checked_tensor(invoke(model, to_device(inputs, device)))
    return outputs.detach()
