"""Tiny problems of every likelihood, with dense oracles that share no code with the library."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap
from torch.utils.data import DataLoader, TensorDataset

from laplace_debiased.posterior import DebiasedKronLaplace
from tests import oracles
from tests.zoo import mlp

F = nn.functional
IGNORED = -100


class Tagger(nn.Module):
    """Labels every position of a sequence [m, T, 4], with a view of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(h + 0.5 * h.mean(1, keepdim=True))


class Reward(nn.Module):
    """Reward of an input [m, 4] → [m, 1], or of both of a pair [m, 2, 4] → [m, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rewards = self.head(torch.tanh(self.inner(x)))
        return rewards.squeeze(-1) if x.ndim == 3 else rewards


class StackedReward(Reward):
    """The same, with all first inputs of the pairs before all second ones in between."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return super().forward(x)
        rewards = super().forward(torch.cat([x[:, 0], x[:, 1]]))
        return torch.cat(rewards.chunk(2), 1)


def sample_loss(likelihood: str, f: Tensor, y: Tensor) -> Tensor:
    """Negative log likelihood of one sample, by torch's own losses."""
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(f, y.reshape(f.shape).to(f), reduction="sum")
    if likelihood == "regression":
        return 0.5 * (f - y).square().sum()
    logits, labels = f.reshape(-1, f.shape[-1]), y.reshape(-1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True, eq=False)
class Case:
    """A model with data of a likelihood."""

    model: nn.Module
    x: Tensor
    y: Tensor
    likelihood: str
    options: dict

    def loader(self, batch_size: int = 5, **kwargs: object) -> DataLoader:
        return DataLoader(TensorDataset(self.x, self.y), batch_size=batch_size, **kwargs)

    def posterior(self, **kwargs: object) -> DebiasedKronLaplace:
        return DebiasedKronLaplace(self.model, self.likelihood, **{**self.options, **kwargs})

    def outputs(self, x: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return copy.deepcopy(self.model).eval()(self.x if x is None else x)

    def jacobian(self, x: Tensor | None = None) -> Tensor:
        """Jacobian of the flattened outputs [m, T·C, P]."""
        names = [name for name, _ in self.model.named_parameters()]
        return oracles.jacobian(self.model, self.x if x is None else x, names)

    def losses(self) -> Tensor:
        return torch.stack(
            [
                sample_loss(self.likelihood, f, y)
                for f, y in zip(self.outputs(), self.y, strict=True)
            ]
        )

    def middles(self, fisher: str) -> Tensor:
        """What stands for ∇²_f ℓ of every sample [m, T·C, T·C]."""
        f = self.outputs()
        shape = f.shape[1:]

        def loss(flat: Tensor, y: Tensor) -> Tensor:
            return sample_loss(self.likelihood, flat.reshape(shape), y)

        flat = f.flatten(1)
        if fisher == "type2":
            return torch.stack([hessian(loss)(r, y) for r, y in zip(flat, self.y, strict=True)])
        gradients = torch.stack(
            [torch.func.grad(loss)(row, y) for row, y in zip(flat, self.y, strict=True)]
        )
        return torch.einsum("mc,md->mcd", gradients, gradients)

    def ggn(self, fisher: str = "type2") -> Tensor:
        """Curvature summed over all samples [P, P]."""
        jac = self.jacobian()
        return torch.einsum("mcp,mcd,mdq->pq", jac, self.middles(fisher), jac)

    def covariance(self, la: DebiasedKronLaplace, x: Tensor) -> Tensor:
        """Covariance of the flattened outputs of every sample [m, T·C, T·C]."""
        jac = self.jacobian(x)
        scale = 1 / (float(la.sigma_noise) ** 2 * la.temperature)
        precision = oracles.dense_precision(la.H, la.prior_precision.double(), scale)
        return vmap(lambda j: j @ torch.linalg.solve(precision, j.T))(jac)


def case(name: str, n: int = 13) -> Case:
    """A problem by name; depends on its arguments only."""
    g = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = {
            "binary": lambda: mlp(1),
            "binary flat": lambda: mlp(1),
            "multi-label": lambda: mlp(3),
            "sequence": Tagger,
            "sequence ignoring": Tagger,
            "ignoring": lambda: mlp(3),
            "outputs": lambda: mlp(3),
            "rewards": Reward,
            "stacked rewards": StackedReward,
        }[name]().double()
    pairs, three = ("rewards", "stacked rewards"), ("sequence", "sequence ignoring")
    shape = (2,) if name in pairs else (3,) if name in three else ()
    x = torch.randn(n, *shape, 4, generator=g).double()
    match name:
        case "binary" | "binary flat" | "multi-label":
            y = torch.randint(2, (n, 3 if name == "multi-label" else 1), generator=g)
            y = y.squeeze(1).bool() if name == "binary flat" else y.float()
            return Case(model, x, y, "bernoulli", {})
        case "outputs":
            return Case(model, x, torch.randn(n, 3, generator=g).double(), "regression", {})
        case "rewards" | "stacked rewards":
            return Case(model, x, torch.randint(2, (n,), generator=g), "reward_modeling", {})
    y = torch.randint(3, (n, *shape), generator=g)
    if "ignoring" in name:
        y = y.masked_fill(torch.rand(y.shape, generator=g) < 0.4, IGNORED)
        return Case(model, x, y, "classification", {"ignore_index": IGNORED})
    return Case(model, x, y, "classification", {})


NAMES = [
    "binary",
    "binary flat",
    "multi-label",
    "sequence",
    "sequence ignoring",
    "ignoring",
    "outputs",
    "rewards",
    "stacked rewards",
]
