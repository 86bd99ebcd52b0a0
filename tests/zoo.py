"""Tiny models with data, in float64 unless asked otherwise, and loaders over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Positions(nn.Module):
    """Linear layers over two dimensions of positions, averaged before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).mean((1, 2)))


class HeadPositions(nn.Module):
    """A head over positions whose logits are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))).mean((1, 2))


def mlp(n_outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, n_outputs))


def cnn(n_outputs: int = 3, **convolution: object) -> nn.Module:
    """Two convolutions and a head over 6×6 images; an in-place ReLU follows the first."""
    body = nn.Sequential(
        nn.Conv2d(2, 3, **{"kernel_size": 3, "padding": 1, **convolution}),  # type: ignore[arg-type]
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 1, stride=3),
        nn.Tanh(),
        nn.Flatten(),
    )
    width = body(torch.zeros(1, 2, 6, 6)).shape[1]
    return nn.Sequential(*body, nn.Linear(width, n_outputs))


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False))


@dataclass(frozen=True)
class Kind:
    """A kind of model with the shape of its inputs."""

    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]


KINDS = {
    "mlp": Kind(mlp, (4,)),
    "cnn": Kind(cnn, (2, 6, 6)),
    "positions": Kind(Positions, (2, 3, 3)),
    "head_positions": Kind(HeadPositions, (2, 2, 3)),
    "strided_dilated": Kind(
        lambda: cnn(kernel_size=(3, 2), stride=(2, 1), dilation=(1, 2)), (2, 6, 6)
    ),
    "circular": Kind(lambda: cnn(padding_mode="circular"), (2, 6, 6)),
    "reflect": Kind(lambda: cnn(padding_mode="reflect", padding=(1, 2)), (2, 6, 6)),
    "same": Kind(lambda: cnn(padding="same", kernel_size=(2, 3)), (2, 6, 6)),
    "replicate": Kind(lambda: cnn(padding_mode="replicate", bias=False), (2, 6, 6)),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, its data and its likelihood."""

    model: nn.Module
    x: Tensor
    y: Tensor
    likelihood: str

    @property
    def dataset(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def loader(self, index: Sequence[int] | slice = slice(None), batch_size: int = 5) -> DataLoader:
        """Unshuffled loader over some of the samples."""
        rows = index if isinstance(index, slice) else list(index)
        return DataLoader(TensorDataset(self.x[rows], self.y[rows]), batch_size=batch_size)

    @property
    def names(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad]


def problem(
    kind: str = "mlp",
    likelihood: str = "classification",
    *,
    n: int = 26,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A problem that depends on its arguments only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = KINDS[kind].build().to(dtype)
        x = torch.randn(n, *KINDS[kind].input_shape, dtype=dtype)
        n_outputs = model(x[:1].clone()).shape[1]
        y = (
            torch.randint(n_outputs, (n,))
            if likelihood == "classification"
            else torch.randn(n, n_outputs, dtype=dtype)
        )
    return Problem(model, x, y, likelihood)


class Breaking:
    """A loader that raises after some batches, on every walk from the given one on."""

    def __init__(self, loader: DataLoader, after: int, from_walk: int = 0) -> None:
        self.loader, self.after, self.from_walk = loader, after, from_walk
        self.dataset: Dataset = loader.dataset
        self.generator = loader.generator
        self.walks = 0

    def __iter__(self) -> Iterator[object]:
        walk, self.walks = self.walks, self.walks + 1
        for number, batch in enumerate(self.loader):
            if walk >= self.from_walk and number == self.after:
                raise OSError("the disk is gone")
            yield batch
