"""A model run with other tensors in place of its own, without a write to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.network.function_modes import BlockMode
from laplace_debiased.network.interrupts import unbroken


class _StandIns(BlockMode):
    """Hands every torch function the stand-in where it is given the tensor itself.

    Attribute access is a torch function too: ``weight.T``, ``weight.dtype`` and ``weight.data`` are
    the stand-in's. What torch cannot see keeps the tensor: a scripted function, a kernel of another
    library that takes it by its pointer from C++, and a view that the model made of it earlier.

    Args:
        stand_ins: by tensor.
    """

    def __init__(self, stand_ins: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._kept = tuple(stand_ins)  # as long as they live, their ids are theirs alone
        self._stand_ins = {id(tensor): value for tensor, value in stand_ins.items()}

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it with stand-ins for arguments, and derivatives of what it computes."""
        args, kwargs = self._replaced(args), self._replaced(kwargs)
        if kwargs.get("scale_grad_by_freq", False):
            # It divides gradients by how often the whole batch reads a row: no derivatives.
            kwargs["scale_grad_by_freq"] = False
        return func(*args, **kwargs)

    def _replaced(self, value: Any) -> Any:
        """The value with every tensor that has a stand-in replaced, however deep it lies."""
        if isinstance(value, Tensor):
            return self._stand_ins.get(id(value), value)
        if isinstance(value, tuple | list):
            found = [self._replaced(entry) for entry in value]
            if all(new is old for new, old in zip(found, value, strict=True)):
                return value
            return value._make(found) if hasattr(value, "_make") else type(value)(found)
        if isinstance(value, dict):
            return {key: self._replaced(entry) for key, entry in value.items()}
        return value


@unbroken
def substituted(stand_ins: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Every torch function of this thread in the block computes with the stand-ins, by tensor.

    Also without any, gradients are those of the outputs: see ``scale_grad_by_freq`` above.
    """
    with _StandIns(stand_ins):
        yield


def call_with(
    model: nn.Module,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``model(*args, **kwargs)`` with other parameters and buffers; tied ones move together.

    Unlike ``torch.func.functional_call`` it does not put the values into the model for the time of
    the call, where an interrupt, another thread or a second name of the same module may find them.

    Raises:
        TypeError: if one of them belongs to a scripted module, whose code torch functions do not
            reach.
    """
    entries = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    stand_ins = {entries[name]: value for name, value in values.items()}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            _refuse_scripted(module, stand_ins)
    while isinstance(model, nn.DataParallel):  # its replicas would be of the model's own weights
        model = model.module
    with substituted(stand_ins):
        return model(*args, **(kwargs or {}))


def _refuse_scripted(module: nn.Module, stand_ins: Mapping[Tensor, Tensor]) -> None:
    for name, entry in (*module.named_parameters(), *module.named_buffers()):
        if entry in stand_ins:
            raise TypeError(
                f"{name!r} belongs to a scripted module, which runs with its own weights only; use "
                "the module that was scripted."
            )
