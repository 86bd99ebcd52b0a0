"""The data of the optimisation benchmarks and what is measured on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.digits import shuffled_digits

LOSS = nn.CrossEntropyLoss()
BATCH = 64
N_TRAIN, N_VALIDATION = 1097, 300


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] in [0, 1] and labels [n] of each part."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> Digits:
        """Shuffle with a fixed seed and cut."""
        X, y, _ = shuffled_digits(0)
        cuts = [N_TRAIN, N_VALIDATION, len(y) - N_TRAIN - N_VALIDATION]
        return cls(*zip(X.split(cuts), y.split(cuts), strict=True))


def endless_batches(data: tuple[Tensor, Tensor], size: int, seed: int) -> Iterator[Any]:
    """Batches of exactly ``size``; each pass over the data is shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    X, y = data
    while True:
        order = torch.randperm(len(y), generator=generator)
        for index in order[: len(y) // size * size].split(size):
            yield X[index], y[index]


@torch.no_grad()
def mean_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float(LOSS(model(data[0]), data[1]))


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).double().mean())
