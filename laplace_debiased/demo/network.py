"""The demo's network: a small CNN, trained past the point where its confidence is honest."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from laplace_debiased.demo.data import N_CLASSES, Split
from laplace_debiased.network.rng import preserved_rng

LEARNING_RATE = 1e-2
BATCH_SIZE = 64


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
        nn.Linear(32, N_CLASSES),
    )


def train_network(train: Split, *, epochs: int, seed: int, progress_bar: bool) -> nn.Module:
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
                logits = model(train.inputs[chosen])
                functional.cross_entropy(logits, train.labels[chosen]).backward()
                optimizer.step()
    model.zero_grad()
    return model.eval()
