"""Fits of large networks with few samples; each lives in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from laplace_debiased.factory import DebiasedLaplace

N_CLASSES = 10
N_DATA = 50_000


class RandomInputs(Dataset):
    """Standard normal inputs and random labels, made when they are asked for.

    Args:
        shape: of one input.
        n_classes: labels are below it.
    """

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        self._shape, self._n_classes = shape, n_classes

    def __len__(self) -> int:
        return N_DATA

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        label = torch.randint(self._n_classes, (), generator=generator)
        return torch.randn(self._shape, generator=generator), label


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(3072, 64), (3072,), 64),
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=N_CLASSES),
        (3, 64, 64),
        N_CLASSES,
    ),
    "resnet50": (
        lambda: torchvision.models.resnet50(num_classes=N_CLASSES),
        (3, 64, 64),
        N_CLASSES,
    ),
    "vit_b_16_64": (
        lambda: torchvision.models.vit_b_16(image_size=64, num_classes=N_CLASSES),
        (3, 64, 64),
        N_CLASSES,
    ),
    "vit_b_16_224": (
        lambda: torchvision.models.vit_b_16(num_classes=N_CLASSES),
        (3, 224, 224),
        N_CLASSES,
    ),
}
"""A network, the shape of an input and the number of classes, by name."""


class Budget:
    """One network with one posterior; its weights are random.

    Args:
        network: a name of :data:`NETWORKS`.
        sharpness: the last layer is multiplied by it: from 1, where all samples have about the
            same curvature, to 10 and more, where few have most of it, as trained networks do.
    """

    def __init__(self, network: str, sharpness: float = 1.0) -> None:
        make, self._shape, n_classes = NETWORKS[network]
        torch.manual_seed(0)
        self._model = make().eval()
        last = [module for module in self._model.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            last.weight.mul_(sharpness)
        self._loader = DataLoader(RandomInputs(self._shape, n_classes), batch_size=32)
        self._posterior = DebiasedLaplace(self._model)

    def fit(self, n_samples: int) -> dict[str, Any]:
        """Fit; seconds by stage."""
        self._posterior.fit(self._loader, n_samples=n_samples)
        report = getattr(self._posterior, "fit_report", None)
        return {
            "stages": {} if report is None else dict(report.stages),
            "samples": {} if report is None else dict(report.samples),
        }

    def predict(self, batch: int) -> dict[str, Any]:
        """Predict a batch; the sum of its probabilities."""
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn((batch, *self._shape), generator=generator)
        return {"total": float(self._posterior(inputs).sum())}

    def save(self) -> dict[str, Any]:
        """Write the posterior; bytes of the file and of the weights."""
        weights = sum(p.numel() * p.element_size() for p in self._model.parameters())
        with TemporaryDirectory() as folder:
            path = Path(folder) / "posterior.pt"
            self._posterior.save(path)
            return {"file_bytes": os.path.getsize(path), "weight_bytes": weights}
