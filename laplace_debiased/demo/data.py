"""Scikit-learn's digits, split: two classes held out as out of distribution, two shifted tests."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

HELD_OUT_DIGITS = (8, 9)
"""Digits the network never sees: real images that belong to none of its classes."""

N_CLASSES = 8
N_TRAIN, N_VALIDATION = 600, 300
SENSOR_NOISE_STD = 4.0
"""Standard deviation of the pixel noise in every image, on the data set's scale from 0 to 16.

Without it the digits are so easy that a network makes hardly any errors to be over-confident about.
"""

HEAVY_NOISE_STD = 7.0
"""The same in the noisy test split."""

ROTATION_DEGREES = 20.0
PREDICTION_BATCH = 64


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs [n, 1, 8, 8] and labels [n] of one part of the data."""

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dataset(self) -> TensorDataset:
        """The split as a data set of pairs."""
        return TensorDataset(self.inputs, self.labels)

    def loader(self, batch_size: int = PREDICTION_BATCH) -> DataLoader:
        """Batches in the order of the split."""
        return DataLoader(self.dataset, batch_size=batch_size)

    def subset(self, indices: Tensor) -> Split:
        """The samples at ``indices``."""
        return Split(self.inputs[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class DigitSplits:
    """All splits, standardised with the mean and standard deviation of the training pixels.

    Every image carries sensor noise.

    Attributes:
        train: digits 0 to 7, 600 samples.
        validation: digits 0 to 7, 300 samples; temperature and prior precisions are tuned on it.
        test: the remaining samples of digits 0 to 7.
        noisy: the test images with heavier noise.
        rotated: the test images, rotated to one side or the other under the same noise.
        ood: all images of the held-out digits; their labels are not used.
    """

    train: Split
    validation: Split
    test: Split
    noisy: Split
    rotated: Split
    ood: Split

    def truncated(self, n_train: int, n_others: int) -> DigitSplits:
        """At most ``n_train`` training samples and ``n_others`` of every other split."""
        return DigitSplits(
            **{
                name: part.subset(
                    torch.arange(len(part))[: n_train if name == "train" else n_others]
                )
                for name, part in ((f.name, getattr(self, f.name)) for f in fields(self))
            }
        )

    @property
    def shifts(self) -> dict[str, Split]:
        """The labelled test splits by name."""
        return {"clean": self.test, "noisy": self.noisy, "rotated": self.rotated}


def load_splits(seed: int = 0) -> DigitSplits:
    """Split the digits; equal seeds give equal splits.

    Args:
        seed: of the split (stratified by class), the noise and the direction of the rotations.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, digits = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(digits).long()
    inside = np.flatnonzero(~np.isin(digits, HELD_OUT_DIGITS))
    outside = np.flatnonzero(np.isin(digits, HELD_OUT_DIGITS))
    fitting, testing = train_test_split(
        inside, train_size=N_TRAIN + N_VALIDATION, random_state=seed, stratify=digits[inside]
    )
    training, validating = train_test_split(
        fitting, train_size=N_TRAIN, random_state=seed, stratify=digits[fitting]
    )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(pixels.shape, generator=generator)
    sides = torch.randint(0, 2, (len(pixels),), generator=generator) * 2 - 1
    seen = pixels + SENSOR_NOISE_STD * noise
    rotated = rotate(pixels, ROTATION_DEGREES * sides) + SENSOR_NOISE_STD * noise
    mean, std = seen[training].mean(), seen[training].std()

    def split(images: Tensor, indices: np.ndarray) -> Split:
        return Split((images[indices] - mean) / std, labels[indices])

    return DigitSplits(
        train=split(seen, training),
        validation=split(seen, validating),
        test=split(seen, testing),
        noisy=split(pixels + HEAVY_NOISE_STD * noise, testing),
        rotated=split(rotated, testing),
        ood=split(seen, outside),
    )


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [n, 1, H, W] about their centres by ``degrees`` [n], bilinear, zeros from outside."""
    angles = torch.deg2rad(degrees)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    maps = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], -2)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
