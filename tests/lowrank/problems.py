"""Tiny float64 networks of many architectures, and dense oracles that share no code with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.zoo import mlp


class Attention(nn.Module):
    """An encoder layer with LayerNorm and attention over two positions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    """One weight in two places, one module called twice, a 0-d parameter and an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.head = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.again(torch.tanh(self.first(torch.tanh(self.first(x)))))
        return self.head(hidden * self.scale)


class DataDependent(nn.Module):
    """Control flow that reads a value: torch cannot vectorise it over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(torch.tanh(x) if float(x.detach().sum()) < 1e9 else x)


class Tokens(nn.Module):
    """Embedding of token ids that come in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(torch.tanh(self.embedding(batch["input_ids"])).mean(1))


def cnn() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    norm.running_mean, norm.running_var = torch.tensor([0.3, -0.2]), torch.tensor([0.7, 1.4])
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3)
    )


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "cnn with BatchNorm": (cnn, (1, 4, 4)),
    "transformer": (Attention, (2, 4)),
    "tied, reused, 0-d, unused": (Tied, (4,)),
    "not vectorisable": (DataDependent, (4,)),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A network in evaluation mode with data."""

    model: nn.Module
    x: Tensor
    y: Tensor
    likelihood: str

    def loader(self, index: slice = slice(None), batch_size: int = 4) -> DataLoader:
        return DataLoader(TensorDataset(self.x[index], self.y[index]), batch_size=batch_size)

    @property
    def parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]


def case(
    kind: str = "mlp",
    likelihood: str = "classification",
    n: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build, shape = ARCHITECTURES[kind]
        model = build().to(dtype).eval()
        x = torch.randn(n, *shape, dtype=dtype)
        if likelihood == "classification":
            return Case(model, x, torch.randint(3, (n,)), likelihood)
        return Case(model, x, torch.randn(n, 3, dtype=dtype), likelihood)


def jacobian(model: nn.Module, parameters: list[Tensor], inputs: Any) -> tuple[Tensor, Tensor]:
    """Outputs [m, C] and their Jacobian [m, C, P]: one ordinary backward pass per output."""
    outputs = model(inputs)
    rows = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    value, parameters, retain_graph=True, materialize_grads=True
                )
            ]
        )
        for value in outputs.flatten()
    ]
    return outputs.detach(), torch.stack(rows).reshape(*outputs.shape, -1)


def sample_curvatures(c: Case) -> Tensor:
    """J_nᵀ ∇²_f ℓ J_n of every sample [m, P, P]."""
    outputs, rows = jacobian(c.model, c.parameters, c.x)
    p = torch.softmax(outputs, -1)
    hessians = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    if c.likelihood == "regression":
        hessians = torch.eye(outputs.shape[1], dtype=p.dtype).expand_as(hessians)
    return torch.einsum("ncp,ncd,ndq->npq", rows, hessians, rows)


def ggn(c: Case, index: slice = slice(None)) -> Tensor:
    """Per-sample mean over some samples [P, P]."""
    return sample_curvatures(c)[index].mean(0)


def eigenvectors(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Non-zero eigenvalues, descending, and their eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = int((values > 1e-12 * values[0]).sum())
    kept = kept if rank is None else min(kept, rank)
    return values[:kept], vectors[:, :kept]


def along(basis: Tensor, magnitudes: Tensor) -> Tensor:
    return (basis * magnitudes) @ basis.T


@contextmanager
def double_by_default() -> Iterator[None]:
    """For laplace-torch, which rounds some constants to the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
