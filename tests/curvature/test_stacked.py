"""Networks that put parts of all samples behind each other, as pairs of texts often are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased import DebiasedLaplace
from laplace_debiased.curvature.recorder import record


class Texts(nn.Module):
    """Rewards [m, 2] of pairs of texts [m, 2, T], as one batch of 2m in either order."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.words, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.places = nn.Parameter(torch.randn(3, 4))
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 1)

    def rewards(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.words(tokens) + self.places)
        windows = h.reshape(-1, 4)  # positions in the batch's dimension
        h = torch.tanh(self.inner(windows)).reshape(len(tokens), -1, 5)
        return self.head(h.mean(1))

    def forward(self, tokens: Tensor) -> Tensor:
        if self.order != "by sample":
            parts = torch.cat([tokens[:, 0], tokens[:, 1]])
            if self.order == "transposed":
                parts = tokens.transpose(0, 1).reshape(-1, tokens.shape[2])
            first, second = self.rewards(parts).chunk(2)
            return torch.cat([first, second], 1)
        return self.rewards(tokens.flatten(0, 1)).reshape(-1, 2)


def posterior(order: str) -> DebiasedLaplace:
    torch.manual_seed(0)
    model = Texts(order).double()
    tokens, y = torch.randint(7, (9, 2, 3)), torch.randint(2, (9,))
    la = DebiasedLaplace(model, "reward_modeling")
    la.fit(DataLoader(TensorDataset(tokens, y), batch_size=4))
    return la


@pytest.mark.parametrize("order", ["joined", "transposed"])
def test_either_order_has_the_same_posterior(order: str) -> None:
    one, other = posterior("by sample"), posterior(order)
    assert other.coverage.covered == one.coverage.covered
    assert not other.coverage.excluded
    for expected, found in zip(one.H.blocks, other.H.blocks, strict=True):
        torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-10, atol=1e-12)


class Steps(nn.Module):
    """Logits of sequences [m, T, 4]: steps in front, then samples, in layers of flat rows."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return self.in_rows(x, *x.shape[:2])
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))

    def in_rows(self, x: Tensor, m: int, t: int) -> Tensor:
        h = torch.tanh(self.first(x.transpose(0, 1).flatten(0, 1)))
        h = h.reshape(t, m, 5).transpose(0, 1).reshape(m * t, 5)
        return self.head(torch.tanh(self.second(h)).reshape(m, t, 5).mean(1))


class InFront(Steps):
    """The same with steps in front all the way."""

    def in_rows(self, x: Tensor, m: int, t: int) -> Tensor:
        h = torch.tanh(self.first(x.transpose(0, 1).reshape(t * m, 4))).view(t, m, 5)
        h = torch.tanh(self.second(h.reshape(t * m, 5)))
        return self.head(h.view(t, m, 5).mean(0))


@pytest.mark.parametrize(
    ("kind", "m", "t", "batch_size"),
    [
        (Steps, 9, 3, 4),
        # As many steps as samples are not taken for each other.
        (Steps, 10, 5, 5),
        (InFront, 10, 5, 5),
    ],
)
def test_steps_in_front_of_samples(kind: type[Steps], m: int, t: int, batch_size: int) -> None:
    found = []
    for flat in (False, True):
        torch.manual_seed(0)
        la = DebiasedLaplace(kind(flat=flat).double(), strict=True)
        x, y = torch.randn(m, t, 4).double(), torch.arange(m) % 3
        la.fit(DataLoader(TensorDataset(x, y), batch_size=batch_size))
        found.append((la, la(x[:batch_size])))
    (one, expected), (other, actual) = found
    for left, right in zip(one.H.blocks, other.H.blocks, strict=True):
        torch.testing.assert_close(right.eigenvalues, left.eigenvalues, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


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
