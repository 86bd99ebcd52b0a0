"""Networks that put parts of all samples behind each other, as pairs of texts often are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.recorder import record


class Texts(nn.Module):
    """Rewards [m, 2] of pairs of texts [m, 2, T], as one batch of 2m in either order."""

    def __init__(self, *, stacked: bool) -> None:
        super().__init__()
        self.stacked = stacked
        self.words, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.places = nn.Parameter(torch.randn(3, 4))
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def rewards(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.words(tokens) + self.places)
        windows = h.reshape(-1, 4)  # positions in the batch's dimension
        h = torch.tanh(self.inner(windows)).reshape(len(tokens), -1, 5)
        return self.head(h.mean(1))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.stacked:
            first, second = self.rewards(torch.cat([tokens[:, 0], tokens[:, 1]])).chunk(2)
            return torch.cat([first, second], 1)
        return self.rewards(tokens.flatten(0, 1)).reshape(-1, 2)


def posterior(*, stacked: bool) -> DebiasedLaplace:
    torch.manual_seed(0)
    model = Texts(stacked=stacked).double()
    tokens, y = torch.randint(7, (9, 2, 3)), torch.randint(2, (9,))
    la = DebiasedLaplace(model, "reward_modeling")
    la.fit(DataLoader(TensorDataset(tokens, y), batch_size=4))
    return la


def test_either_order_has_the_same_posterior() -> None:
    one, other = posterior(stacked=False), posterior(stacked=True)
    assert other.coverage.covered == one.coverage.covered
    assert not other.coverage.excluded
    for expected, found in zip(one.H.blocks, other.H.blocks, strict=True):
        torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-10, atol=1e-12)


def test_only_parts_of_the_inputs_count() -> None:
    """A tensor with as many rows as samples may be anything."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            columns = x.T.contiguous()
            return self.layer(x) + torch.cat([columns, columns])[:3].T

    model = Square()
    assert record(model, ["layer.weight"], torch.randn(3, 3)).copies == 1
