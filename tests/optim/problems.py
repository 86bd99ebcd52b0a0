"""Small problems in float64 and dense answers to them."""

import numpy as np
import torch
from torch import Tensor

from laplace_debiased.optim import Quadratic

RTOL = 1e-8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spd(dimension: int, seed: int, n_rows: int | None = None) -> Tensor:
    """AᵀA/n with A [n, P]: full rank for n ≥ P."""
    n_rows = 2 * dimension if n_rows is None else n_rows
    A = torch.randn(n_rows, dimension, generator=generator(seed), dtype=torch.float64)
    return A.T @ A / n_rows


def vector(dimension: int, seed: int) -> Tensor:
    return torch.randn(dimension, generator=generator(seed), dtype=torch.float64)


def quadratic(dimension: int, seed: int, damping: float = 0.1) -> Quadratic:
    return Quadratic(spd(dimension, seed), vector(dimension, seed + 1), damping)


def dense(q: Quadratic) -> np.ndarray:
    """H + δI [P, P]."""
    return np.stack([q.product(row).numpy() for row in torch.eye(q.dimension).double()])


def dense_value(q: Quadratic, x: Tensor) -> float:
    """Value of q at x from the dense matrix."""
    H, g, v = dense(q), q.gradient.numpy(), x.numpy()
    return float(g @ v + 0.5 * v @ H @ v)


def conjugate_directions(H: np.ndarray, g: np.ndarray, n: int) -> list[np.ndarray]:
    """CG's directions without CG: conjugate each residual of the Krylov minimiser to all before.

    The minimiser over the span of the directions so far comes from a dense solve; Gram-Schmidt in
    the inner product of H does the rest.
    """
    directions: list[np.ndarray] = []
    for _ in range(n):
        residual = g.copy()
        if directions:
            D = np.stack(directions, axis=1)
            residual += H @ D @ np.linalg.solve(D.T @ H @ D, -D.T @ g)
        d = -residual
        for _ in range(2):
            for e in directions:
                d -= e * (e @ H @ d) / (e @ H @ e)
        directions.append(d)
    return directions
