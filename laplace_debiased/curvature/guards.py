"""Leave the user's model as it was: evaluation mode inside, everything restored outside."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_debiased.data.inputs import batch_length, select_rows, to_device

_LOCKS: weakref.WeakKeyDictionary[nn.Module, ModelLock] = weakref.WeakKeyDictionary()
_REGISTRY_LOCK = threading.Lock()
_SERIAL = itertools.count()

__all__ = [
    "HALF_DTYPES",
    "ModelLock",
    "batch_length",
    "call_with",
    "eager_execution",
    "evaluation_mode",
    "exact_arithmetic",
    "full_precision",
    "math_attention",
    "model_lock",
    "requiring_grad",
    "select_rows",
    "to_device",
]

HALF_DTYPES = (torch.float16, torch.bfloat16)


class ModelLock:
    """A re-entrant lock over a model's modules, held while their mode, hooks or weights differ.

    Args:
        parts: the locks that it stands for; taken in order of creation, so that two models which
            share modules cannot wait for each other.
    """

    def __init__(self, parts: Iterable[_Part]) -> None:
        self._parts = tuple(sorted(set(parts)))

    @property
    def parts(self) -> tuple[_Part, ...]:
        """The locks that it stands for."""
        return self._parts

    def __enter__(self) -> ModelLock:
        held = []
        try:
            for part in self._parts:
                part.lock.acquire()
                held.append(part)
        except BaseException:  # an interrupt between two of them
            for part in reversed(held):
                part.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for part in reversed(self._parts):
            part.lock.release()


@dataclass(frozen=True, order=True)
class _Part:
    serial: int
    lock: threading.RLock = field(compare=False, default_factory=threading.RLock)


def model_lock(model: nn.Module) -> ModelLock:
    """One lock per model; models that share a module (a wrapper, a backbone) exclude each other.

    Whoever predicts with the same model waits for their turn; other models go on meanwhile.
    """
    with _REGISTRY_LOCK:
        known = _LOCKS.get(model)
        if known is not None:
            return known
        modules = list(model.modules())
        parts = {part for module in modules if module in _LOCKS for part in _LOCKS[module].parts}
        lock = ModelLock(parts or {_Part(next(_SERIAL))})
        for module in modules:
            _LOCKS.setdefault(module, lock)
        return lock


def _forget_locks() -> None:
    """A forked process has one thread: what others held at the fork is held by no one there."""
    global _REGISTRY_LOCK
    _REGISTRY_LOCK = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; each module's own mode restored on the way out.

    Compiled modules run as they were written: compiled code calls no hooks that it was not compiled
    with, and would be compiled anew for every set of weights.

    Raises:
        ValueError: if a forward pass would overwrite weights, before there is one.
    """
    with model_lock(model), eager_execution():
        modes = [(module, module.training) for module in model.modules()]
        if any(_rewrites_weights(module) for module, _ in modes):
            _refuse_rewritten_weights(model)
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def _rewrites_weights(module: nn.Module) -> bool:
    return isinstance(module, _EMBEDDINGS) and module.max_norm is not None


def _refuse_rewritten_weights(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if _rewrites_weights(module):
            raise ValueError(
                f"layer {name!r} is an {type(module).__name__} with max_norm={module.max_norm}: "
                "its forward pass overwrites its own weight, so that no pass could leave the model "
                "as it was. Renormalise the weight once, with "
                f"weight.data.renorm_({module.norm_type}, 0, {module.max_norm}), and set the "
                "layer's max_norm=None; its outputs stay the same."
            )


class _Switch:
    """A choice of the whole process, not of a thread, that holds while anyone is inside.

    The first to enter sets it and the last to leave restores it, whoever that is.

    Args:
        choose: sets it, with what restores the process's own choice pushed on the stack.
    """

    def __init__(self, choose: Callable[[ExitStack], None]) -> None:
        self._choose = choose
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                with ExitStack() as stack:
                    self._choose(stack)
                    self._restore = stack.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._restore.close()


def _run_eagerly(stack: ExitStack) -> None:
    # Called from within a compiled function, torch allows no such choice.
    with suppress(RuntimeError):
        stack.enter_context(torch.compiler.set_stance("force_eager"))


_EAGER = _Switch(_run_eagerly)


@contextmanager
def eager_execution() -> Iterator[None]:
    """Compiled code runs as it was written while anyone is inside."""
    # Whoever compiles has imported the compiler; doing it here would cost the others seconds.
    with _EAGER() if "torch._dynamo" in sys.modules else nullcontext():
        yield


def _choose_math_attention(stack: ExitStack) -> None:
    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    stack.callback(
        torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
    )
    torch.backends.mha.set_fastpath_enabled(False)


_ATTENTION = _Switch(_choose_math_attention)


@contextmanager
def math_attention() -> Iterator[None]:
    """Plain attention kernels, which forward mode and vmap support, while anyone is inside."""
    with _ATTENTION():
        yield


@contextmanager
def requiring_grad(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Parameters that require gradients inside; those that did not are frozen again outside.

    A posterior outlives the training: many freeze the whole network once that is over, and a
    forward pass would then leave no graph to pull back through.
    """
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def call_with(
    model: nn.Module,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """``model(*args, **kwargs)`` with other parameters and buffers; tied ones move together.

    ``torch.func.functional_call`` swaps and restores a tensor once per *name*. A module that is
    registered under two names (``self.head = self.layers[-1]``) then keeps the swapped tensor in
    place of its parameter. Here every place is swapped once.

    Args:
        model: the module; left untouched.
        values: tensors by the name of the entry that they replace.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    places: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for attribute, entry in (*module._parameters.items(), *module._buffers.items()):
            if entry is not None:
                places.setdefault(id(entry), []).append(f"{prefix}{attribute}")
    entries = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    expanded = {
        place: value for name, value in values.items() for place in places[id(entries[name])]
    }
    return torch.func.functional_call(model, expanded, args, dict(kwargs or {}), tie_weights=False)


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No automatic casts inside: sums of squares are formed in the precision of their terms.

    A model that casts on its own does so without the cache of cast weights: inside another
    ``autocast`` it is not emptied after a forward pass, would grow with every transformed call,
    and would not notice a weight that has changed.
    """
    with torch.autocast(device.type, enabled=False, cache_enabled=False):
        yield


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is of half precision, else as it is.

    Sums of squares overflow in float16 and lose their digits in bfloat16.
    """
    return tensor.float() if tensor.dtype in HALF_DTYPES else tensor
