"""Whether a model is still the one that a posterior was fitted to, at the cost of a glance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from laplace_debiased.curvature.guards import model_lock
from laplace_debiased.errors import ModelChangedError
from laplace_debiased.persistence.fingerprint import ModelFingerprint, fingerprint

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_NAMED = 3
"""Changes that a message lists."""


@dataclass(frozen=True, eq=False)
class _Glance:
    """What can be seen of tensors without reading them.

    Attributes:
        tensors: the tensors themselves: as long as they are held, their ids are theirs alone.
        marks: id, version counter and address of each.
        probes: per tensor in main memory a view of its bits and the place of one entry. Writing
            through ``tensor.data`` leaves the version counter alone; this sees most of it.
        seen: the bits there.
    """

    tensors: tuple[Tensor, ...]
    marks: tuple[tuple[int, int, int], ...]
    probes: tuple[tuple[Any, tuple[int, ...]], ...]
    seen: tuple[int, ...]

    def still_holds(self, tensors: list[Tensor]) -> bool:
        return (
            tuple(map(_mark, tensors)) == self.marks
            and tuple([bits[place] for bits, place in self.probes]) == self.seen
        )


class ModelWatch:
    """Compares a model with the fingerprint of the one that a posterior was fitted to.

    Every check looks at the identity, version counter and address of each tensor, and at one entry
    of those in main memory: microseconds. Only if one of these changed are the weights hashed;
    equal weights (after ``load_state_dict`` of the same, a move to another device, a step of
    length zero) are the same model.

    Args:
        reference: fingerprint of the weights at the fit.
    """

    def __init__(self, reference: ModelFingerprint) -> None:
        self.reference = reference
        self._glance: _Glance | None = None

    def __reduce__(self) -> tuple[type[ModelWatch], tuple[ModelFingerprint]]:
        # A copy belongs to copied tensors, at other addresses.
        return type(self), (self.reference,)

    def check(self, model: nn.Module) -> None:
        """Check that the model's weights are those of the fit.

        Args:
            model: the model with the weights that the reference describes.

        Raises:
            ModelChangedError: naming what changed.
        """
        # Sampled networks swap their weights under this lock.
        with model_lock(model):
            tensors = _tensors(model)
            if self._glance is not None and self._glance.still_holds(tensors):
                return
            changes = self.reference.differences(fingerprint(model))
            if not changes:
                self._glance = _glance_at(tensors)
                return
        more = f" and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
        raise ModelChangedError(
            "the model is not the one that this posterior was fitted to: "
            f"{', '.join(changes[:_MAX_NAMED])}{more}. Call fit again, or load the weights back "
            "that it was fitted with."
        )


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and persistent buffers, as they are registered now."""
    found: list[Tensor] = []
    pending, met = [model], {id(model)}
    while pending:
        module = pending.pop()
        found += [p for p in module._parameters.values() if p is not None]
        if module._buffers:
            passing = module._non_persistent_buffers_set
            found += [b for n, b in module._buffers.items() if b is not None and n not in passing]
        for child in module._modules.values():
            if child is not None and id(child) not in met:
                met.add(id(child))
                pending.append(child)
    return found


def _mark(tensor: Tensor) -> tuple[int, int, int]:
    try:
        return id(tensor), tensor._version, tensor.data_ptr()
    except RuntimeError:  # an inference tensor counts no versions
        return id(tensor), -1, tensor.data_ptr()


def _glance_at(tensors: list[Tensor]) -> _Glance:
    probes = tuple(probe for tensor in tensors if (probe := _probe(tensor)) is not None)
    seen = tuple([bits[place] for bits, place in probes])
    return _Glance(tuple(tensors), tuple(map(_mark, tensors)), probes, seen)


def _probe(tensor: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The bits of the entry of largest magnitude: no scaling or resetting leaves it as it is."""
    integer = _INTEGERS.get(tensor.element_size())
    if tensor.device.type != "cpu" or integer is None or tensor.numel() == 0:
        return None
    with torch.inference_mode(False), torch.no_grad():
        values = tensor.detach()
        if values.dtype is torch.bool:
            values = values.view(torch.uint8)
        place = np.unravel_index(int(values.abs().argmax()), tuple(values.shape))
        bits = values.view(integer).numpy()
    return bits, tuple(int(axis) for axis in place)
