"""Dense counterparts of the diagnostics, by plain reverse mode without any vmap."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.oracles import loss_of


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def sample_losses(model: nn.Module, likelihood: str, x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """Losses [m] at flat trainable parameters, in evaluation mode and without fast paths."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    pieces = theta.split([p.numel() for p in named.values()])
    values = {n: v.view_as(p) for (n, p), v in zip(named.items(), pieces, strict=True)}
    outputs = functional_call(model.eval(), values, (x.clone(),))
    rows = torch.eye(outputs.shape[-1], dtype=outputs.dtype)[y] if y.ndim == 1 else y
    return loss_of(likelihood, outputs, rows)


def gradients(model: nn.Module, likelihood: str, x: Tensor, y: Tensor) -> Tensor:
    """Gradient of every sample [m, P]."""
    return torch.autograd.functional.jacobian(
        lambda theta: sample_losses(model, likelihood, x, y, theta), flat(model)
    )


def hessians(model: nn.Module, likelihood: str, x: Tensor, y: Tensor) -> Tensor:
    """Hessian of every sample [m, P, P], reverse over reverse mode in Python loops."""
    rows = [
        torch.autograd.functional.hessian(
            lambda theta, i=i: sample_losses(
                model, likelihood, x[i : i + 1], y[i : i + 1], theta
            ).sum(),
            flat(model),
        )
        for i in range(len(x))
    ]
    return torch.stack(rows)


def mean_hessian(model: nn.Module, likelihood: str, x: Tensor, y: Tensor) -> Tensor:
    """Hessian of the mean loss [P, P], reverse over reverse mode in Python loops."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(
            lambda theta: sample_losses(model, likelihood, x, y, theta).mean(), flat(model)
        )


def along(matrices: Tensor, directions: Tensor) -> Tensor:
    """uᵀMu [..., k] for matrices [..., P, P] and columns u of ``directions``."""
    return ((matrices @ directions) * directions).sum(-2)


def orthonormal(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator)).Q


class Attention(nn.Module):
    """Token embedding, one encoder layer with LayerNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


def attention() -> tuple[nn.Module, Tensor, Tensor]:
    """A small transformer in training mode with tokens and labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Attention().double()
        tokens, labels = torch.randint(5, (7, 3)), torch.randint(3, (7,))
    return model, tokens, labels


class Keyed(nn.Module):
    """A model that takes a mapping of tensors."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.body(inputs["x"]) * inputs["scale"]


def expected_disjoint(own: Tensor, population: Tensor, batch_size: int, size: int) -> Tensor:
    """Expected measurement on a disjoint batch, given the own one: (M·population − m·own)/(M − m).

    A disjoint batch samples the population without the own batch, so it leans the other way. Hence
    (m/M)·own + (1 − m/M)·other is unbiased for the population along any directions that the own
    batch chose.

    Args:
        own: mean over the own batch, of anything.
        population: mean over all M samples of the same.
        batch_size: m.
        size: M.
    """
    return (size * population - batch_size * own) / (size - batch_size)


def own_slope_at_optimum(own_curvature: Tensor, noise_std: float, batch_size: int) -> Tensor:
    r"""E|uᵀĝ| at the optimum given the inputs: σ√(2λ̂/(πm)), where the population's slope is 0.

    There ĝ = −1/m Σ x_n σε_n, so uᵀĝ ~ N(0, σ²λ̂/m) along an own eigenvector u: a slope that is
    all noise, and that orienting u makes positive. On other data its mean is 0.

    Args:
        own_curvature: own eigenvalues λ̂ [k].
        noise_std: σ.
        batch_size: m.
    """
    return noise_std * (2.0 * own_curvature / (math.pi * batch_size)).sqrt()
