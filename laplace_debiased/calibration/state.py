"""Leave a user's model and random number generators as they were."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from laplace_debiased.data.loaders import loader_generators
from laplace_debiased.network.rng import preserved_rng


@contextmanager
def untouched(model: nn.Module | None, loader: Any) -> Iterator[None]:
    """Run in eval mode with gradients enabled, and put everything back, also after an exception.

    Restores each module's mode, each parameter's data and gradient, the global generators of torch
    (CPU and CUDA), numpy and `random`, and the loader's own; iterating over a `DataLoader` alone
    draws from them.

    Args:
        model: The model that predicts, or None where only the generators are at stake.
        loader: What is walked inside; anything without generators will do.
    """
    modules = [] if model is None else list(model.modules())
    modes = [module.training for module in modules]
    # A sampled predictive writes draws into the parameters and leaves them aliased to its mean.
    parameters = [] if model is None else [(p, p.data, p.grad) for p in model.parameters()]
    try:
        if model is not None:
            model.eval()
        # Some backends differentiate inside a prediction, whatever the caller's grad mode is;
        # leaving inference mode also turns gradients on.
        with (
            preserved_rng(generators=loader_generators(loader)),
            torch.inference_mode(False),
        ):
            yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        for parameter, data, grad in parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.grad = grad
