"""Networks that cannot carry a posterior, or not the one that was asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Words(nn.Module):
    """Embeddings of bounded norm, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.words = nn.Embedding(5, 3, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x).mean(1)


class Noisy(nn.Module):
    """Noise on the logits, whatever the mode."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(x)
        return out + torch.randn_like(out)


class Tempered(nn.Module):
    """Logits over a temperature: what a calibrated wrapper returns."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) / 0.25


def normalised() -> nn.Module:
    """A linear layer whose weight is computed from other parameters."""
    with torch.random.fork_rng(devices=[]):
        return weight_norm(nn.Linear(4, 4))
