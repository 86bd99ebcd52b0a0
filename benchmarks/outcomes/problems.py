"""Trained networks with training samples, test images, their shifts, and images from elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common.models import PublicCifarResNet
from laplace_debiased.demo.digits import batches, load_splits, train_network

CIFAR_TRAIN_SIZE = 50_000
_MEAN = (0.4914, 0.4822, 0.4465)
_DEVIATION = (0.2023, 0.1994, 0.2010)
_NOISE, _BLUR = 0.08, 1.0
"""Standard deviation of the noise on pixels in [0, 1]; of the blur, in pixels."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One network.

    Attributes:
        title: what it is called.
        model: in evaluation mode.
        train: training samples from which curvature is estimated.
        n_data: N.
        sets: test inputs by name, the same images in the same order; "clean" is the first.
        labels: of the test images [n].
        outside: inputs that belong to no class.
        about: what shifts and other images are.
        published: figures of others, (method, NLL, ECE, seconds of its fit or None).
    """

    title: str
    model: nn.Module
    train: DataLoader
    n_data: int
    sets: dict[str, Tensor]
    labels: Tensor
    outside: Tensor
    about: str
    published: tuple[tuple[str, float, float, float | None], ...] = field(default=())

    def on(self, device: torch.device) -> Problem:
        """The same with network and inputs on a device; labels and training samples stay."""
        sets = {name: inputs.to(device) for name, inputs in self.sets.items()}
        model, outside = self.model.to(device), self.outside.to(device)
        return replace(self, model=model, sets=sets, outside=outside)

    def halves(self, seed: int) -> tuple[Tensor, Tensor]:
        """Indices of the two halves of the test images; each chooses for the other."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=generator)
        return order[: len(order) // 2], order[len(order) // 2 :]


PUBLISHED = {
    20: (
        ("MAP", 0.2815, 0.0390, None),
        ("last-layer K-FAC, marginal likelihood", 0.2659, 0.0239, 15.0),
        ("ELLA", 0.2310, 0.0083, 1003.0),
        ("VaLLA", 0.2273, 0.0131, 12083.0),
        ("FMGP", 0.2275, 0.0074, 917.0),
        ("MFVI", 0.2222, 0.0139, 282.0),
    ),
    56: (
        ("MAP", 0.2523, 0.0374, None),
        ("last-layer K-FAC, marginal likelihood", 0.2037, 0.0241, 15.0),
        ("ELLA", 0.1910, 0.0176, 1003.0),
        ("VaLLA", 0.1837, 0.0100, 12083.0),
        ("FMGP", 0.1830, 0.0096, 917.0),
        ("MFVI", 0.1823, 0.0153, 282.0),
    ),
}
"""NLL, ECE and seconds on a GPU, on all 10,000 test images (Ludvins/FixedMeanGaussianProcesses,
results). Seconds are of the ResNet-20."""


def public_resnet(depth: int, weights: Path, images: Path, limit: int | None = None) -> Problem:
    """A public CIFAR-10 network of chenyaofo/pytorch-cifar-models.

    Args:
        depth: 20 or 56.
        weights: its state dict.
        images: an .npz with images ``Xtr``, ``Xte`` (uint8, [n, 3, 32, 32]) and labels ``Ytr``,
            ``Yte``.
        limit: so many test images only.
    """
    model = PublicCifarResNet(depth)
    model.load_state_dict(torch.load(weights, weights_only=True))
    with np.load(images) as stored:
        train, test = (torch.from_numpy(stored[name]).float() / 255 for name in ("Xtr", "Xte"))
        train_labels, labels = (torch.from_numpy(stored[name]).long() for name in ("Ytr", "Yte"))
    test, labels = test[:limit], labels[:limit]
    generator = torch.Generator().manual_seed(0)
    noisy = (test + _NOISE * torch.randn(test.shape, generator=generator)).clamp(0, 1)
    sets = {"clean": test, "noise": noisy, "blur": blurred(test, _BLUR)}
    dataset = TensorDataset(_normalised(train), train_labels)
    return Problem(
        f"CIFAR-10, public ResNet-{depth}",
        model.eval(),
        DataLoader(dataset, batch_size=128, shuffle=True),
        CIFAR_TRAIN_SIZE,
        {name: _normalised(images) for name, images in sets.items()},
        labels,
        _normalised(test.rot90(1, (2, 3))),
        f"{len(labels)} original test images; curvature from {len(dataset)} of the 50,000 training "
        f"images (N = {CIFAR_TRAIN_SIZE:,}). noise: standard deviation {_NOISE:g}; blur: "
        f"{_BLUR:g} pixel; other inputs: the test images turned by 90 degrees.",
        PUBLISHED[depth],
    )


def digits(limit: int | None = None, seed: int = 0, epochs: int = 50) -> Problem:
    """The demo's over-confident network."""
    splits = load_splits(seed)
    train, labels = splits["train"], splits["clean"].tensors[1][:limit]
    model = train_network(train, epochs=epochs, seed=seed, progress_bar=False)
    sets = {"clean": splits["clean"], "noise": splits["noisy"], "turned": splits["rotated"]}
    return Problem(
        "digits, the demo's network",
        model,
        batches(train),
        len(train),
        {name: split.tensors[0][:limit] for name, split in sets.items()},
        labels,
        splits["ood"].tensors[0][:limit],
        f"{len(labels)} test images; {len(train)} training images. "
        "noise and turned: the demo's shifted splits; other inputs: the two digits left out.",
    )


def blurred(images: Tensor, deviation: float) -> Tensor:
    """Images [n, c, h, w] under a Gaussian blur of a standard deviation in pixels."""
    steps = torch.arange(-3.0, 4.0)
    weights = torch.exp(-0.5 * (steps / deviation) ** 2)
    kernel = torch.outer(weights, weights)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 7, 7)
    padded = nn.functional.pad(images, (3, 3, 3, 3), mode="reflect")
    return nn.functional.conv2d(padded, kernel, groups=images.shape[1])


def _normalised(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(value).view(1, 3, 1, 1) for value in (_MEAN, _DEVIATION))
    return (images - mean) / deviation
