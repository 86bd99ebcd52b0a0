"""Leave a user's model and random number generators as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module | None) -> Iterator[None]:
    """Run in eval mode with gradients enabled, and put everything back, also after an exception.

    Restores each module's mode, each parameter's data and gradient, and the global generators of
    torch (CPU and CUDA), numpy and `random`; iterating over a `DataLoader` alone draws from them.

    Args:
        model: The model that predicts, or None where only the generators are at stake.
    """
    modules = [] if model is None else list(model.modules())
    modes = [module.training for module in modules]
    # A sampled predictive writes draws into the parameters and leaves them aliased to its mean.
    parameters = [] if model is None else [(p, p.data, p.grad) for p in model.parameters()]
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        if model is not None:
            model.eval()
        # Some backends differentiate inside a prediction, whatever the caller's grad mode is;
        # leaving inference mode also turns gradients on.
        with torch.random.fork_rng(devices=cuda), torch.inference_mode(False):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        for parameter, data, grad in parameters:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.grad = grad
