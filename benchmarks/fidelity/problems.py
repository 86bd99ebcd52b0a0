"""Networks and data of the fidelity benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.models import CifarResNet20, freeze_batch_norm, load_images


@dataclass(frozen=True, eq=False)
class Problem:
    """A trained network, the data that fits draw from, and the inputs that are predicted.

    Attributes:
        name: for titles.
        model: trained, in evaluation mode, BatchNorm frozen.
        train: the pool of all fits.
        test_inputs: [n, ...].
        test_labels: [n].
        dense: whether the dense GGN is small enough to be a reference.
    """

    name: str
    model: nn.Module
    train: DataLoader
    test_inputs: Tensor
    test_labels: Tensor
    dense: bool


def small_digits_cnn() -> nn.Module:
    """A CNN with 2,578 parameters on 8×8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 18),
        nn.ReLU(),
        nn.Linear(18, 10),
    )


def small_mlp() -> nn.Module:
    """A tanh network with 3,466 parameters on 8×8 images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.Tanh(),
        nn.Linear(32, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def digits(
    network: Callable[[], nn.Module] = small_digits_cnn,
    name: str = "digits",
    seed: int = 0,
    n_test: int = 400,
) -> Problem:
    """scikit-learn's digits, 1,397 for training; a small network trained with Adam to fit them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    test, train = order[:n_test], order[n_test:]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
        dataset = TensorDataset(inputs[train], labels[train])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
        for _ in range(25):
            for x, y in DataLoader(dataset, batch_size=64, shuffle=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    model.eval().zero_grad()
    loader = DataLoader(dataset, batch_size=64)
    return Problem(name, model, loader, inputs[test], labels[test], dense=True)


FEW_LAYERS = ("conv1.weight", "layer1.0.conv1.weight", "linear.weight", "linear.bias")
"""Parameters of the ResNet-20 whose GGN is small enough to be dense (3,386 entries)."""


def resnet20(
    images: Path, weights: Path, n_test: int, seed: int = 0, *, few_layers: bool = False
) -> Problem:
    """CIFAR-10 ResNet-20 from files; fits draw from the training images.

    Args:
        images: ImageFolder, or a zip of one.
        weights: state dict.
        n_test: test inputs.
        seed: seed of their choice.
        few_layers: freeze all parameters but ``FEW_LAYERS``, so that there is a dense reference.
    """
    model = CifarResNet20()
    model.load_state_dict(torch.load(weights, weights_only=True))
    freeze_batch_norm(model.eval())
    if few_layers:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in FEW_LAYERS)
    inputs, labels = load_images(images, "train")
    test_inputs, test_labels = load_images(images, "test")
    chosen = torch.randperm(len(test_inputs), generator=torch.Generator().manual_seed(seed))[
        :n_test
    ]
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=64)
    return Problem(
        "CIFAR-10 ResNet-20" + (", three layers" if few_layers else ""),
        model,
        loader,
        test_inputs[chosen],
        test_labels[chosen],
        dense=few_layers,
    )
