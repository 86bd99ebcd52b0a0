"""Small convolutional networks for scikit-learn's digits (8×8 images, 10 classes)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def shuffled_digits(seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Images [1797, 1, 8, 8] in [0, 1], labels [1797], and the generator that shuffled them."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    x = torch.tensor(images, dtype=torch.float32).div(16).view(-1, 1, 8, 8)[order]
    return x, torch.tensor(labels)[order], generator


def network(name: str, seed: int) -> nn.Module:
    """A network of ``NETWORKS`` with the initial weights of a seed; global RNG untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name]()


def _pooled() -> nn.Module:
    """Two convolutions with pooling and a linear layer, 6,090 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def _shallow() -> nn.Module:
    """One convolution and two linear layers, 33,562 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def _deep(activation: type[nn.Module]) -> nn.Module:
    """Three convolutions and two linear layers, 37,930 parameters."""
    convolutions = [
        layer
        for channels in (1, 16, 16)
        for layer in (nn.Conv2d(channels, 16, 3, padding=1), activation())
    ]
    head = [nn.Flatten(), nn.Linear(1024, 32), activation(), nn.Linear(32, 10)]
    return nn.Sequential(*convolutions, *head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "deep-tanh": lambda: _deep(nn.Tanh),
    "deep-relu": lambda: _deep(nn.ReLU),
    "shallow-relu": _shallow,
    "pooled-relu": _pooled,
}
