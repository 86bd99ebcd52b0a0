"""Modes that see every torch function of a block, and nothing of what comes after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self

from torch import overrides
from torch.overrides import TorchFunctionMode


class BlockMode(TorchFunctionMode):
    """A mode that is idle outside of its block, even where torch still holds it.

    Functions of torch that are written in Python put the mode aside with a generator while they
    run. An interrupt in one of them leaves that generator to the garbage collector, which puts the
    mode back when the block is long over. Such a mode hands everything on, and the next block
    removes it.
    """

    inside = False

    @abstractmethod
    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a torch function that is called in the block."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not self.inside:
            return func(*args, **(kwargs or {}))
        return self.run(func, args, kwargs or {})

    def __enter__(self) -> Self:
        _remove_all(lambda mode: isinstance(mode, BlockMode) and not mode.inside)
        super().__enter__()
        self.inside = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.inside = False
        _remove_all(lambda mode: mode is self)


def _remove_all(chosen: Callable[[TorchFunctionMode], bool]) -> None:
    """Remove modes from this thread's stack; the others keep their order."""
    stack = overrides._get_current_function_mode_stack()
    if not any(map(chosen, stack)):
        return
    for _ in stack:
        overrides._pop_mode()
    for mode in stack:
        if not chosen(mode):
            overrides._push_mode(mode)
