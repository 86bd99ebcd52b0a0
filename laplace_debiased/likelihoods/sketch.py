r"""Columns that stand for a loss Hessian's root of many columns.

S z with independent signs z has E[S z zᵀ Sᵀ] = S Sᵀ, for any root S; R of them, over √R, estimate
the loss Hessian of a sample without bias. Along one direction, where all of a sample has the
curvature x, the estimate of R columns has a variance below 2 x²/R; with samples whose curvatures
spread as κ (variance over squared mean), m of them estimate the mean with a relative variance of
(κ + 2(1 + κ)/R)/m at a cost of m (1 + 2R) forward passes: least at R = √(1 + 1/κ), one or two
columns. So the default is two, with more samples in return.
"""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_debiased.likelihoods.losses import LossModel, masked


def sketched_columns(
    model: LossModel, outputs: Tensor, targets: Tensor, seeds: Tensor, n_columns: int
) -> Tensor:
    """Columns [m, C, R] ([m, T, C, R] of sequences) whose outer products have S Sᵀ as their mean.

    Args:
        model: the loss.
        outputs: network outputs f [m, C] or [m, T, C].
        targets: labels or regression targets.
        seeds: one for each sample's signs [m]: no result depends on how a batch is chunked.
        n_columns: R.
    """
    z = signs(seeds, (*outputs.shape[1:], n_columns)).to(outputs)
    return masked(model, targets, model.root_product(outputs, z) / n_columns**0.5)


def signs(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent ±1 [m, *shape] of every sample, as small integers on the CPU."""
    drawn = []
    for seed in seeds.tolist():
        generator = torch.Generator().manual_seed(seed)
        drawn.append(torch.randint(2, shape, generator=generator, dtype=torch.int8))
    return 2 * torch.stack(drawn) - 1
