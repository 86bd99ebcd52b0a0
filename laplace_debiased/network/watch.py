"""Whether a model is still the one that a posterior was fitted to, at the cost of a glance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.errors import ModelChangedError
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.identity import (
    ModelFingerprint,
    fingerprint,
    module_kinds,
    named_tensors,
)
from laplace_debiased.network.inputs import version_of
from laplace_debiased.network.probe import Probe

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VERSION = attrgetter("_version")
_MAX_NAMED = 3
"""Changes that a message lists."""


@dataclass(frozen=True, eq=False)
class _Glance:
    """What can be seen of a model without reading it.

    Attributes:
        registers: the dictionaries of all modules in which parameters, buffers and children are
            registered.
        entries: what was registered there; as long as these are held, their ids are theirs alone.
        ids: their ids.
        tensors: the tensors whose values count.
        versions: their version counters; None where one does not count.
        addresses: where their values are.
        probes: per tensor in main memory a flat view of its bits and the place of one entry.
            Writing through ``tensor.data`` leaves the version counter alone; this sees most of it.
        seen: the bits there.
    """

    registers: tuple[dict[str, Any], ...]
    entries: tuple[Any, ...]
    ids: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...] | None
    addresses: tuple[int, ...]
    probes: tuple[tuple[memoryview, int], ...]
    seen: tuple[int, ...]

    @classmethod
    def at(cls, model: nn.Module) -> _Glance:
        """Of a model as it is."""
        kinds = ("_parameters", "_buffers", "_modules")
        registers = tuple(getattr(m, kind) for m in model.modules() for kind in kinds)
        entries = tuple(_registered(registers))
        tensors = tuple(tensor for _, tensor in named_tensors(model))
        probes = tuple(probe for tensor in tensors if (probe := _probe(tensor)) is not None)
        return cls(
            registers,
            entries,
            tuple(map(id, entries)),
            tensors,
            _versions(tensors),
            tuple(map(Tensor.data_ptr, tensors)),
            probes,
            tuple([bits[place] for bits, place in probes]),
        )

    def still_holds(self) -> bool:
        """Whether all is as it was; some tens of nanoseconds per tensor."""
        return (
            tuple(map(id, _registered(self.registers))) == self.ids
            and _versions(self.tensors) == self.versions
            and tuple(map(Tensor.data_ptr, self.tensors)) == self.addresses
            and tuple([bits[place] for bits, place in self.probes]) == self.seen
        )


class Writes:
    """What a model's own forward passes write to in place, or put another tensor for.

    Args:
        model: the model, before the passes.
        values: its fingerprint.
    """

    def __init__(self, model: nn.Module, values: ModelFingerprint) -> None:
        self._model, self._values = model, values
        self._named = tuple(named_tensors(model))
        self._versions = tuple(version_of(tensor) for _, tensor in self._named)

    def check(self, *, values: bool = False) -> None:
        """Check that nothing has been written to; a ValueError names the first tensor that has.

        With ``values`` every entry is compared: a write through ``.data`` leaves no other trace.
        """
        now, before = dict(named_tensors(self._model)), self._values.entries
        after = fingerprint(self._model).entries if values else before
        for (name, tensor), version in zip(self._named, self._versions, strict=True):
            same = version_of(tensor) == version and now.get(name) is tensor
            if not same or after.get(name) != before[name]:
                raise ValueError(
                    f"the model writes to its own {name!r} in a forward pass in evaluation mode, "
                    "so that every pass is one of another model. Compute with a copy of it, write "
                    "only where self.training is true, or register it with persistent=False if "
                    "no output depends on it."
                )


class ModelWatch:
    """Compares a model with the fingerprint of the one that a posterior was fitted to.

    Every check looks at the identity, version counter and address of each tensor, and at one entry
    of those in main memory, and at which objects the modules' attributes are: microseconds. Only
    if a tensor changed are the weights hashed, and only if an attribute did is it asked what the
    modules are now. Equal weights (after ``load_state_dict`` of the same, a move to another device,
    a step of length zero) are the same model.

    Args:
        reference: fingerprint of the weights at the fit.
        probe: a sample and its outputs at the fit. It is run again after any doubt: a hook, a
            function or an attribute that is another, weights that were loaded again.
    """

    def __init__(self, reference: ModelFingerprint, probe: Probe | None = None) -> None:
        self.reference, self.probe = reference, probe
        self._glance: _Glance | None = None
        self._attributes: list[int] | None = None

    def __reduce__(self) -> tuple[type[ModelWatch], tuple[Any, ...]]:
        # A copy belongs to copied tensors, at other addresses.
        return type(self), (self.reference, self.probe)

    def check(self, model: nn.Module) -> bool:
        """Check that the model's weights are those of the fit.

        Returns:
            Whether its modules or tensors may be other objects than at the last check.

        Raises:
            ModelChangedError: naming what changed.
        """
        attributes = _plain_attributes(model)
        same_tensors = self._glance is not None and self._glance.still_holds()
        if same_tensors and attributes == self._attributes:
            return False
        now = replace(self.reference, kinds=module_kinds(model))
        changes = self.reference.differences(now if same_tensors else fingerprint(model))
        if not changes and self.probe is not None:
            change = self.probe.change(model)
            changes = () if change is None else (change,)
        if changes:
            more = f" and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
            raise ModelChangedError(
                "the model is not the one that this posterior was fitted to: "
                f"{', '.join(changes[:_MAX_NAMED])}{more}. Call fit again, or load the weights "
                "back that it was fitted with."
            )
        if not same_tensors:
            self._glance = _Glance.at(model)
        self._attributes = _plain_attributes(model)
        return not same_tensors


_OWN = frozenset({"training", *vars(nn.Module()).keys()})
"""Attributes of every module: its mode, registers and hooks."""


def _plain_attributes(model: nn.Module) -> list[int]:
    """Which objects the modules' attributes, hooks and functions are.

    Of containers what is in them, of tensors also their versions. An equal one that is another
    only costs.
    """
    found: list[int] = []
    for module in model.modules():
        kind = type(module)
        found += (id(kind), id(kind.forward), *map(id, module._forward_hooks.values()))
        found += map(id, module._forward_pre_hooks.values())
        for name, value in vars(module).items():
            if name not in _OWN:
                found += _parts(value)
    return found


_MOST_PARTS = 64
"""Entries of a container beyond which it is looked at as one."""


def _parts(value: Any) -> list[int]:
    if isinstance(value, Tensor):
        return [id(value), version_of(value)]
    if isinstance(value, list | tuple | dict) and len(value) <= _MOST_PARTS:
        return [id(value), *map(id, value.values() if isinstance(value, dict) else value)]
    return [id(value)]


def _registered(registers: tuple[dict[str, Any], ...]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, registers))


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(map(_VERSION, tensors))
    except RuntimeError:  # an inference tensor counts no versions
        return None


def _probe(tensor: Tensor) -> tuple[memoryview, int] | None:
    """The bits of the entry of largest magnitude: no scaling or resetting leaves it as it is."""
    integer = _INTEGERS.get(tensor.element_size())
    if tensor.device.type != "cpu" or integer is None or tensor.numel() == 0:
        return None
    with outside_inference_mode(), torch.no_grad():
        values = tensor.detach()
        channels_last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
        if not (values.is_contiguous() or channels_last):
            return None
        # In the order of storage, so that a flat view shares the memory of any layout.
        flat = values.as_strided((values.numel(),), (1,))
        bits = flat.view(integer)
        magnitudes = bits if flat.dtype is torch.bool else flat.abs()
        return bits.numpy().data, int(magnitudes.argmax())
