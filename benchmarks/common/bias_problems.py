"""Trained networks whose curvature bias is shown: on digits, and a CIFAR-10 ResNet-20."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.digits import NETWORKS, shuffled_digits
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


def digits_problem(case: DigitsCase) -> Problem:
    """15 epochs of SGD with momentum on 1,400 digits; the other 397 are the test data."""
    x, y, generator = shuffled_digits(case.seed)
    x = x + case.noise * torch.randn(x.shape, generator=generator)
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
