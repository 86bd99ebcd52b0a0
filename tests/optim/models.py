"""Tiny models in float64, their data, and dense curvature by automatic differentiation."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.optim.problems import generator

LOSSES = {
    "cross-entropy": nn.CrossEntropyLoss(),
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(),
}


def tiny_cnn() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3),
        ).double()


def batch(n: int, seed: int, loss: str = "cross-entropy") -> tuple[Tensor, Tensor]:
    g = generator(seed)
    X = torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64)
    if loss == "cross-entropy":
        return X, torch.randint(3, (n,), generator=g)
    return X, torch.rand(n, 3, generator=g, dtype=torch.float64)


def flat_loss(model: nn.Module, loss_func: nn.Module, X: Tensor, y: Tensor):
    """Functions of the flat parameters [P]: the outputs [n, C] and the mean loss."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    start = torch.cat([p.detach().reshape(-1) for _, p in named])

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for _, p in named])
        moved = {n: part.view(p.shape) for (n, p), part in zip(named, parts, strict=True)}
        return functional_call(model, moved, (X,))

    return outputs, lambda theta: loss_func(outputs(theta), y), start


def dense_curvature(model, loss_func, X, y, kind: str) -> Tensor:
    outputs, loss, theta = flat_loss(model, loss_func, X, y)
    if kind == "hessian":
        return torch.autograd.functional.hessian(loss, theta)
    f = outputs(theta).detach()
    J = torch.autograd.functional.jacobian(outputs, theta).reshape(f.numel(), -1)
    inner = torch.autograd.functional.hessian(lambda z: loss_func(z, y), f)
    return J.T @ inner.reshape(f.numel(), -1) @ J
