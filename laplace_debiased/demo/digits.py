"""Scikit-learn's digits, split and shifted, and a small CNN that grows over-confident on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from laplace_debiased.network.rng import preserved_rng

HELD_OUT_DIGITS = (8, 9)
"""Digits the network never sees: real images that belong to none of its classes."""

N_TRAIN, N_VALIDATION = 600, 300
SENSOR_NOISE_STD = 4.0
"""Standard deviation of the pixel noise in every image, on the data set's scale from 0 to 16.

Without it the digits are so easy that a network makes hardly any errors to be over-confident about.
"""

HEAVY_NOISE_STD = 7.0
"""The same in the noisy test split."""

ROTATION_DEGREES = 20.0
BATCH_SIZE = 64
LEARNING_RATE = 1e-2


def load_splits(seed: int = 0) -> dict[str, TensorDataset]:
    """Split the digits; equal seeds give equal splits of images [n, 1, 8, 8] and labels [n].

    All are standardised with the mean and standard deviation of the training pixels, and every
    image carries sensor noise.

    Args:
        seed: of the split (stratified by class), the noise and the direction of the rotations.

    Returns:
        "train" (digits 0 to 7, 600 samples), "validation" (300 others, to tune on), "clean" (the
        rest, to test on), "noisy" (the same with heavier noise), "rotated" (the same, rotated to
        one side or the other), "ood" (all images of the held-out digits, whose labels nobody uses).
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
    chosen = {
        "train": (seen, training),
        "validation": (seen, validating),
        "clean": (seen, testing),
        "noisy": (pixels + HEAVY_NOISE_STD * noise, testing),
        "rotated": (rotated, testing),
        "ood": (seen, outside),
    }
    return {
        name: TensorDataset((images[indices] - mean) / std, labels[indices])
        for name, (images, indices) in chosen.items()
    }


def batches(split: TensorDataset) -> DataLoader:
    """Batches in the order of a split."""
    return DataLoader(split, batch_size=BATCH_SIZE)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Images [n, 1, H, W] about their centres by ``degrees`` [n], bilinear, zeros from outside."""
    angles = torch.deg2rad(degrees)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    maps = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], -2)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def build_network() -> nn.Sequential:
    """Two convolutions and a linear layer, 600 parameters: [m, 1, 8, 8] to logits [m, 8]."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 8),
    )


def train_network(train: TensorDataset, *, epochs: int, seed: int, progress_bar: bool) -> nn.Module:
    """Train without weight decay or early stopping, so that the network grows over-confident.

    Args:
        train: the training split.
        epochs: passes over it, with Adam.
        seed: of the initial weights and of the order of the samples.
        progress_bar: show progress over epochs.

    Returns:
        The trained network in eval mode. The global random number generators are left as they
        were.
    """
    with preserved_rng(seed):
        model = build_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        for _ in tqdm(range(epochs), desc="training", disable=not progress_bar):
            for chosen in torch.randperm(len(train)).split(BATCH_SIZE):
                optimizer.zero_grad()
                inputs, labels = train[chosen]
                functional.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
    model.zero_grad()
    return model.eval()
