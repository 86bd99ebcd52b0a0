"""Evaluating a user's model as a fixed function of its parameters, and leaving no trace."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def as_fixed_function(model: nn.Module) -> Iterator[None]:
    """Make ``model`` a deterministic, twice differentiable function inside the context.

    Every module is in evaluation mode: a quadratic needs the same function at each product, which
    dropout and batch statistics are not. Random numbers that the model draws nevertheless are the
    same at each entry, and the global state is as before on exit. Attention runs on the kernels
    that have second derivatives.

    Restored on exit, also when an exception passes: each module's mode, the torch random states,
    the attention settings.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        stack.callback(_set_modes, modes)
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in modes:
            module.training = False
        yield


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
