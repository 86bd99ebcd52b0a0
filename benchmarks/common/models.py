"""Networks of the benchmarks, and CIFAR-10 images from a folder or a zip of one."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)
_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Block(nn.Module):
    """Two 3×3 convolutions with a parameter-free (option A) shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self._stride = stride
        self._padding = (channels_out - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[m, channels_in, h, w] to [m, channels_out, h/stride, w/stride]."""
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self._stride, :: self._stride]
        if self._padding:
            shortcut = nn.functional.pad(shortcut, (0, 0, 0, 0, self._padding, self._padding))
        return torch.relu(residual + shortcut)


class CifarResNet20(nn.Module):
    """ResNet-20 for 32×32 images (He et al. 2015, section 4.2), 269,722 parameters, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1)
        self.layer2 = self._stage(16, 32, 2)
        self.layer3 = self._stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
        rest = (_Block(channels_out, channels_out, 1) for _ in range(2))
        return nn.Sequential(_Block(channels_in, channels_out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """[m, 3, 32, 32] to logits [m, 10]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class _PublicBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut is a 1×1 convolution where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module = nn.Identity()
        if channels_in != channels_out:
            shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """[m, channels_in, h, w] to [m, channels_out, h/stride, w/stride]."""
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(residual + self.downsample(x))


class PublicCifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32×32 images; parts named as in chenyaofo/pytorch-cifar-models."""

    def __init__(self, depth: int, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        n_blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, 1, n_blocks)
        self.layer2 = self._stage(16, 32, 2, n_blocks)
        self.layer3 = self._stage(32, 64, 2, n_blocks)
        self.fc = nn.Linear(64, n_classes)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, stride: int, n_blocks: int) -> nn.Sequential:
        rest = (_PublicBlock(channels_out, channels_out, 1) for _ in range(n_blocks - 1))
        return nn.Sequential(_PublicBlock(channels_in, channels_out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """[m, 3, 32, 32] to logits [m, 10]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """Exclude BatchNorm's scales and shifts from the posterior; laplace-torch cannot fit them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


def mlp() -> nn.Module:
    """64-128-128-10 fully connected, 26,122 parameters."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def small_cnn() -> nn.Module:
    """Three convolutions and two linear layers on 32×32 images, 56,714 parameters."""
    stages = [
        layer
        for channels_in, channels_out in ((3, 16), (16, 32), (32, 64))
        for layer in (
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
    ]
    head = [nn.Flatten(), nn.Linear(1024, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(*stages, *head)


def wide_head(classes: int, features: int = 512) -> nn.Module:
    """A fixed feature map 32-D and a linear last layer D-C; ``body`` and ``head``."""
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(32, features), nn.ReLU()))
    model.add_module("head", nn.Linear(features, classes))
    return model


def load_images(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one split.

    Args:
        path: folder in the ImageFolder layout, ``<split>/<class>/*.jpg`` (or png), or a zip of it.
            Classes are numbered in alphabetical order.
        split: "train" or "test".

    Returns:
        Normalised images [n, 3, h, w], sorted by name, and labels [n].

    Raises:
        ValueError: if there is no image of that split.
    """
    entries = sorted(_image_entries(path, split), key=lambda entry: str(entry[0]))
    if not entries:
        raise ValueError(f"{path} holds no images in {split}/<class>/; is it an ImageFolder?")
    classes = sorted({name.parent.name for name, _ in entries})
    pixels = np.stack([_decode(content) for _, content in entries])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (_MEAN, _DEVIATION))
    labels = torch.tensor([classes.index(name.parent.name) for name, _ in entries])
    return (images - mean) / deviation, labels


def _decode(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def _image_entries(path: Path, split: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    def wanted(name: PurePosixPath) -> bool:
        return name.suffix.lower() in _SUFFIXES and name.parent.parent.name == split

    if path.is_dir():
        for file in path.rglob("*"):
            name = PurePosixPath(file.as_posix())
            if wanted(name):
                yield name, file.read_bytes()
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = PurePosixPath(member)
            if wanted(name):
                yield name, archive.read(member)
