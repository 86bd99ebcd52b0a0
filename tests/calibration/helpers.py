"""Calibrated synthetic predictions and a posterior of known output."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

RTOL = 1e-8


def softmax(logits):
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def calibrated_classes(n=400, n_classes=4, scale=2.0, seed=0):
    """Logits [n, C] and labels [n] drawn from their softmax."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, n_classes))
    cumulative = softmax(logits).cumsum(axis=1)
    labels = (rng.uniform(size=(n, 1)) > cumulative).sum(axis=1).clip(max=n_classes - 1)
    return logits, labels


def calibrated_gaussians(n=400, n_outputs=2, seed=0):
    """Means, standard deviations and targets drawn from them, all [n, K]."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(n, n_outputs))
    std = rng.uniform(0.5, 2.0, size=(n, n_outputs))
    return mean, std, mean + std * rng.normal(size=(n, n_outputs))


def drawing_loader(*arrays, **kwargs):
    """A loader that shuffles with a generator of its own."""
    return loader_of(*arrays, shuffle=True, generator=torch.Generator().manual_seed(3), **kwargs)


def loader_of(*arrays, batch_size=32, **kwargs):
    dataset = TensorDataset(*(torch.as_tensor(array) for array in arrays))
    return DataLoader(dataset, batch_size=batch_size, **kwargs)


@dataclass
class FakePosterior:
    """Its inputs are what it predicts: probabilities, or means beside variances."""

    likelihood: str = "classification"
    model: nn.Module = field(default_factory=lambda: nn.Linear(2, 2))
    sigma_noise: torch.Tensor | float = 1.0
    dict_key_y: str = "labels"
    _device: str = "cpu"
    calls: list = field(default_factory=list)

    def __call__(self, x, **kwargs):
        self.calls.append(kwargs)
        x = x["x"] if isinstance(x, dict) else x
        if self.likelihood == "regression":
            half = x.shape[1] // 2
            return x[:, :half], x[:, half:]
        return x
