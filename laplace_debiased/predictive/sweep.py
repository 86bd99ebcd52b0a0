r"""Output covariances for a whole grid of prior precisions from one pass.

J̃ does not depend on the prior precision δ, and Cov[f_c, f_c'] = Σ_ij J̃_c,ij J̃_c',ij /(hNλ_ij + δ)
is linear in the table 1/(hNλ + δ): for G priors it is one matrix product per layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.passes import CurvaturePass
from laplace_debiased.curvature.rows import PositionRows, RankOneRows
from laplace_debiased.curvature.rows.rotated import spread_last
from laplace_debiased.predictive.functional import (
    NamedBlocks,
    beside,
    joined,
    per_position,
    repeated,
    rotated_jacobians,
)
from laplace_debiased.predictive.predictor import Sweep
from laplace_debiased.predictive.selection import (
    ALL_OUTPUTS,
    OutputSelection,
    SelectedChunk,
    selected_walks,
)


def prior_sweep(
    curvature_pass: CurvaturePass,
    likelihood_blocks: NamedBlocks,
    priors: Tensor,
    inputs: Any,
    selection: OutputSelection = ALL_OUTPUTS,
    *,
    diagonal: bool,
) -> Sweep:
    """Mean and output covariance under each of G scalar prior precisions.

    Args:
        curvature_pass: the pass over the network.
        likelihood_blocks: the likelihood's share h·N·λ of the posterior precision; no prior in it.
        priors: δ [G].
        inputs: one batch of model inputs, m samples.
        selection: of which outputs.
        diagonal: variances only.
    """
    groups = []
    for walk in selected_walks(curvature_pass, inputs, selection):
        outputs, covariances, indices = [], [], []
        for part in walk:
            with torch.no_grad():
                outputs.append(part.outputs.detach())
                covariances.append(_chunk_sweep(part, likelihood_blocks, priors, diagonal))
                indices.append(part.chosen)
        groups.append((torch.cat(outputs), torch.cat(covariances, dim=1), joined(indices)))
    mean, swept, chosen = zip(*groups, strict=True)
    whole = beside(swept, 2)
    return Sweep(beside(mean, 1), whole[:-1], whole[-1], joined(chosen, 1))


def _chunk_sweep(
    part: SelectedChunk, blocks: NamedBlocks, priors: Tensor, diagonal: bool
) -> Tensor:
    """Covariances under every prior, and last those without curvature at δ = 1."""
    *lead, n_outputs = part.shape
    m = math.prod(lead)
    shape = (m, n_outputs) if diagonal else (m, n_outputs, n_outputs)
    total = part.outputs.new_zeros(len(priors) + 1, *shape)
    for name, jacobian in rotated_jacobians(part.chunk, blocks):
        table = blocks.block(name).eigenvalues
        if isinstance(jacobian, PositionRows):
            weights = _reciprocals(table, priors).movedim(-1, 0)
            apart = jacobian.per_position(n_outputs)
            total += apart.covariances(weights, diagonal=diagonal)
            continue
        eigenvalues = jacobian.entries(table)
        if isinstance(jacobian, RankOneRows):
            squares = repeated(jacobian.input_squares(), m)
            scale = _reciprocal_products(squares, eigenvalues, priors)  # [G + 1, m, D_out]
            scale = spread_last(scale, (jacobian.spread,))
            total += _scaled_grams(per_position(jacobian.columns, n_outputs), scale, diagonal)
        else:
            rows = per_position(jacobian.values, n_outputs)
            if eigenvalues.ndim > 1:
                eigenvalues = repeated(eigenvalues, m)
            total += _table_grams(rows, eigenvalues, priors, diagonal)
    return total.reshape(len(total), *lead, *shape[1:])


def _reciprocals(eigenvalues: Tensor, priors: Tensor) -> Tensor:
    """1 / (λ + δ_g), and last 1: [..., G + 1]."""
    swept = (eigenvalues.unsqueeze(-1) + priors).reciprocal()
    return torch.cat([swept, torch.ones_like(swept[..., :1])], dim=-1)


def _reciprocal_products(squares: Tensor, eigenvalues: Tensor, priors: Tensor) -> Tensor:
    """Σ_j squares_j / (λ_ij + δ_g) [G + 1, m, D_out], last Σ_j squares_j.

    One prior at a time, to hold one table only.
    """
    swept = [squares @ (eigenvalues + prior).reciprocal().mT for prior in priors]
    alone = squares.sum(-1, keepdim=True).expand(-1, len(eigenvalues))
    return torch.stack([*swept, alone])


def _scaled_grams(g: Tensor, scale: Tensor, diagonal: bool) -> Tensor:
    """g̃ diag(scale) g̃ᵀ for every prior, or its diagonal."""
    if diagonal:
        return torch.einsum("mci,gmi->gmc", g.square(), scale)
    return torch.stack([(g * per_prior.unsqueeze(1)) @ g.transpose(1, 2) for per_prior in scale])


def _table_grams(rows: Tensor, eigenvalues: Tensor, priors: Tensor, diagonal: bool) -> Tensor:
    """Σ_k rows_ck rows_c'k / (λ_k + δ_g) as matrix products with a table [K, G + 1].

    [m, K, G + 1] where rows are of other entries for every sample. The last column is one.
    """
    m, n_outputs, _ = rows.shape
    table = _reciprocals(eigenvalues, priors)
    if diagonal:
        return (rows.square() @ table).permute(2, 0, 1)
    result = rows.new_empty(m, n_outputs, n_outputs, table.shape[-1])
    for c in range(n_outputs):
        products = (rows[:, c : c + 1] * rows[:, c:]) @ table
        result[:, c, c:] = products
        result[:, c:, c] = products
    return result.permute(3, 0, 1, 2)
