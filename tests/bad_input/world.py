"""A fitted posterior with its model and data, and a snapshot of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from laplace_debiased.factory import DebiasedLaplace
from tests.likelihoods.problems import Reward, Tagger
from tests.zoo import mlp

N = 12


@dataclass(eq=False)
class World:
    """What a row may spoil: a model, its data, and a posterior that was fitted on them.

    Attributes:
        likelihood: of the posterior.
        model: the network.
        x: inputs.
        y: targets.
        la: the posterior, fitted.
    """

    likelihood: str
    model: nn.Module
    x: Tensor
    y: Tensor
    la: Any = field(init=False)

    def __post_init__(self) -> None:
        self.la = self.posterior()
        self.la.fit(self.loader())
        self.la.prior_precision = 0.7

    def loader(self, x: Any = None, y: Any = None, **kwargs: Any) -> DataLoader:
        """Loader over the data, or over others."""
        data = TensorDataset(self.x if x is None else x, self.y if y is None else y)
        # A loader without a generator draws from the global one at every walk.
        return DataLoader(data, **{"batch_size": 5, "generator": torch.Generator(), **kwargs})

    def linear(self, *before: nn.Module, **kwargs: Any) -> nn.Module:
        """Modules and a linear layer after them; the global generator stays as it is."""
        with torch.random.fork_rng(devices=[]):
            return nn.Sequential(*before, nn.Linear(4, 3, **kwargs))

    def posterior(self, model: Any = None, **options: Any) -> Any:
        """A new posterior."""
        options = {"likelihood": self.likelihood, **options}
        return DebiasedLaplace(self.model if model is None else model, **options)

    def refit(self, loader: Any, **kwargs: Any) -> None:
        """Fit the posterior again."""
        self.la.fit(loader, **kwargs)


def world(likelihood: str) -> World:
    """The world of a likelihood; "sequence" is classification at positions."""
    g = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model: nn.Module = {"sequence": Tagger, "reward_modeling": Reward}.get(
            likelihood, lambda: mlp(1 if likelihood == "binary" else 3)
        )()
    middle = {"sequence": (3,), "reward_modeling": (2,)}.get(likelihood, ())
    x = torch.randn(N, *middle, 4, generator=g)
    match likelihood:
        case "regression":
            y = torch.randn(N, 3, generator=g)
        case "bernoulli":
            y = torch.randint(2, (N, 3), generator=g).float()
        case "reward_modeling":
            y = torch.randint(2, (N,), generator=g)
        case "sequence":
            return World("classification", model, x, torch.randint(3, (N, 3), generator=g))
        case _:
            y = torch.randint(3, (N,), generator=g)
    return World(likelihood, model, x, y)


def snapshot(la: Any) -> dict[str, Any]:
    """Everything that a posterior says, without its model."""
    return {
        "tables": [block.eigenvalues.clone() for block in la.H.blocks],
        "bases": [
            [b.clone() for b in (block.output_basis, block.input_basis) if b is not None]
            for block in la.H.blocks
        ],
        "mean": la.mean.clone(),
        "prior_precision": la.prior_precision.clone(),
        "prior_mean": la.prior_mean.clone(),
        "sigma_noise": la.sigma_noise.clone(),
        "temperature": la.temperature,
        "loss": la.loss,
        "n_data": la.n_data,
        "covered": la.coverage.covered,
        "link": la.tuned_link_approx,
    }


class Stream(IterableDataset):
    """Samples without a length or indices."""

    def __init__(self, w: World) -> None:
        self.w = w

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(self.w.x, self.w.y, strict=True))


class Walks:
    """An iterable of batches that gives something else on every walk."""

    def __init__(self, *walks: Callable[[], Any]) -> None:
        self.walks, self.n = walks, 0

    def __iter__(self) -> Iterator[Any]:
        walk = self.walks[min(self.n, len(self.walks) - 1)]
        self.n += 1
        return iter(walk())


class Wrapped(nn.Module):
    """A model followed by a function."""

    def __init__(self, net: nn.Module, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.after = net, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.net(x))
