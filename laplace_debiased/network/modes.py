"""Leave the user's model as it was: evaluation mode inside, everything restored outside.

Guards, from the narrow to the wide: ``evaluation_mode`` around a forward pass,
``differentiable_kernels`` around derivatives of one, ``undisturbed`` around all that a call of the
library does with a model and a loader. ``eager_execution`` and ``math_attention`` are choices of
the whole process; nothing else sets them. ``public_call`` stands at the entry.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext, suppress
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_debiased.errors import MemoryExhaustedError, RankFailedError
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.interrupts import unbroken
from laplace_debiased.network.locks import model_lock
from laplace_debiased.network.memory import is_out_of_memory, memory_exhausted
from laplace_debiased.network.precision import exact_arithmetic
from laplace_debiased.network.rng import preserved_rng

P = ParamSpec("P")
T = TypeVar("T")


@unbroken
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; each module's own mode restored on the way out.

    Compiled modules run as they were written: compiled code calls no hooks that it was not compiled
    with, and would be compiled anew for every set of weights.

    Raises:
        ValueError: if a forward pass would overwrite weights, before there is one.
    """
    with model_lock(model), eager_execution():
        modules = list(model.modules())
        _refuse_rewritten_weights(modules, model)
        training = [module for module in modules if module.training]
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _refuse_rewritten_weights(modules: Iterable[nn.Module], model: nn.Module) -> None:
    for module in modules:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            name = next(name for name, found in model.named_modules() if found is module)
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

    @unbroken
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


@unbroken
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


@unbroken
def math_attention() -> Iterator[None]:
    """Plain attention kernels, which forward mode and vmap support, while anyone is inside."""
    with _ATTENTION():
        yield


@unbroken
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and kernels that forward mode and vmap support; all restored after.

    The fused attention kernels and the encoder's fast path know neither, and automatic casts would
    change the precision of a measurement.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    with (
        evaluation_mode(model),
        outside_inference_mode(),
        exact_arithmetic(torch.device(device)),
        math_attention(),
    ):
        yield


@unbroken
def undisturbed(
    model: nn.Module | None, *, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Evaluation mode with gradients enabled; the model and every random generator restored after.

    Restores each module's mode, each parameter's data and gradient, the global generators of torch,
    numpy and ``random``, and those given; also when an exception passes through.

    Args:
        model: the network; None where only the generators are at stake.
        generators: further generators, such as those of the loader that is walked inside: a walk
            alone draws from them.
    """
    # A sampled predictive of laplace-torch writes draws into the parameters and leaves them
    # aliased to its mean.
    parameters = [] if model is None else [(p, p.data, p.grad) for p in model.parameters()]
    with (
        preserved_rng(generators=generators),
        nullcontext() if model is None else evaluation_mode(model),
        # Some backends differentiate inside a prediction, whatever the caller's grad mode is;
        # leaving inference mode also turns gradients on.
        outside_inference_mode(),
    ):
        try:
            yield
        finally:
            for parameter, data, grad in parameters:
                if parameter.data_ptr() != data.data_ptr():
                    parameter.data = data
                parameter.grad = grad


@unbroken
def _grad_mode_kept() -> Iterator[None]:
    enabled = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)


def public_call(function: Callable[P, T]) -> Callable[P, T]:
    """What a user calls; an interrupt anywhere in it leaves torch's grad mode as it was.

    Out of memory is told with its remedy, a :class:`~laplace_debiased.errors.MemoryExhaustedError`.

    ``torch.no_grad`` and its like can be interrupted between setting the mode and the block. The
    guard also stands for those inside of it: they find a handler in place.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with _grad_mode_kept():
            try:
                return function(*args, **kwargs)
            except (MemoryExhaustedError, RankFailedError):
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise memory_exhausted(error) from error

    return call
