"""Trained networks whose curvature bias is shown: on digits, and a CIFAR-10 ResNet-20."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.common.models import CifarResNet20, load_images

N_DIGITS_TRAIN = 1400


@dataclass(frozen=True)
class Problem:
    """A trained network with its training data."""

    title: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    accuracy: dict[str, float]


@dataclass(frozen=True)
class DigitsCase:
    """A network of ``NETWORKS``, the noise on its images (standard deviation), and a seed.

    The seed fixes the split, the noise, the initial weights and the order of training.
    """

    network: str
    noise: float = 0.0
    seed: int = 0

    @property
    def title(self) -> str:
        """The network and what is not the default."""
        noise = f", input noise {self.noise:g}" if self.noise else ""
        seed = f", seed {self.seed}" if self.seed else ""
        return f"digits, {self.network}{noise}{seed}"

    @classmethod
    def parse(cls, text: str) -> DigitsCase:
        """``network``, ``network:noise`` or ``network:noise:seed``, for argparse."""
        network, *rest = text.split(":")
        if network not in NETWORKS or len(rest) > 2:
            known = ", ".join(NETWORKS)
            raise argparse.ArgumentTypeError(f"{text!r} is not NETWORK[:NOISE[:SEED]] of {known}")
        noise, seed = [*rest, *("0", "0")[len(rest) :]]
        return cls(network, float(noise), int(seed))


def shallow_relu() -> nn.Module:
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
    "shallow-relu": shallow_relu,
}


def digits_problem(case: DigitsCase) -> Problem:
    """15 epochs of SGD with momentum on 1,400 digits; the other 397 are the test data."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(case.seed)
    order = torch.randperm(len(images), generator=generator)
    x = torch.tensor(images, dtype=torch.float32).div(16).view(-1, 1, 8, 8)[order]
    x = x + case.noise * torch.randn(x.shape, generator=generator)
    y = torch.tensor(labels)[order]
    train, test = (x[:N_DIGITS_TRAIN], y[:N_DIGITS_TRAIN]), (x[N_DIGITS_TRAIN:], y[N_DIGITS_TRAIN:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model = NETWORKS[case.network]()
        _train(model, *train, epochs=15)
    accuracy = {"train": _accuracy(model, *train), "test": _accuracy(model, *test)}
    return Problem(case.title, model, *train, accuracy)


def cifar_problem(data: Path, weights: Path) -> Problem:
    """The trained ResNet-20 on the training images that ``data`` holds."""
    model = CifarResNet20()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    train, test = load_images(data, "train"), load_images(data, "test")
    accuracy = {"train": _accuracy(model, *train), "test": _accuracy(model, *test)}
    return Problem("CIFAR-10, ResNet-20", model, *train, accuracy)


def _train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimiser.step()
        schedule.step()


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = [
        (model(a).argmax(1) == b).sum() for a, b in zip(x.split(256), y.split(256), strict=True)
    ]
    return float(sum(right) / len(y))
