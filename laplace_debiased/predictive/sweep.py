r"""Output covariances for a whole grid of prior precisions from one pass.

J̃ does not depend on the prior precision δ, and Cov[f_c, f_c'] = Σ_ij J̃_c,ij J̃_c',ij /(hNλ_ij + δ)
is linear in the table 1/(hNλ + δ): for G priors it is one matrix product per layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.curvature.passes import Chunk, CurvaturePass, identity_columns
from laplace_debiased.curvature.rows import RankOneRows
from laplace_debiased.predictive.functional import (
    NamedBlocks,
    OutputCovariance,
    per_position,
    repeated,
    rotated_jacobians,
)
from laplace_debiased.predictive.last_layer import covariance_of_features


def prior_sweep(
    curvature_pass: CurvaturePass,
    likelihood_blocks: NamedBlocks,
    prior_precisions: Tensor,
    inputs: Any,
    *,
    diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """Mean and output covariance under each of G scalar prior precisions.

    Args:
        curvature_pass: the pass over the network.
        likelihood_blocks: the likelihood's share h·N·λ of the posterior precision; no prior in it.
        prior_precisions: δ [G].
        inputs: one batch of model inputs, m samples.
        diagonal: variances only.

    Returns:
        Outputs f [m, C]; covariances [G, m, C] if ``diagonal``, else [G, m, C, C]. For outputs at T
        positions, [m, T, ...] in place of [m, ...].
    """
    outputs, sweeps = [], []
    for chunk in curvature_pass.chunks(inputs, identity_columns):
        with torch.no_grad():
            outputs.append(chunk.outputs.detach())
            sweeps.append(_chunk_sweep(chunk, likelihood_blocks, prior_precisions, diagonal))
    return torch.cat(outputs), torch.cat(sweeps, dim=1)


def _chunk_sweep(chunk: Chunk, blocks: NamedBlocks, priors: Tensor, diagonal: bool) -> Tensor:
    *lead, n_outputs = chunk.outputs.shape
    m = math.prod(lead)
    shape = (m, n_outputs) if diagonal else (m, n_outputs, n_outputs)
    total = chunk.outputs.new_zeros(len(priors), *shape)
    for layer in chunk.layers:
        for name, jacobian in rotated_jacobians(layer, chunk.layer_rows(layer), blocks):
            eigenvalues = jacobian.entries(blocks.block(name).eigenvalues)
            if isinstance(jacobian, RankOneRows):
                squares = repeated(jacobian.inputs.square(), m)
                scale = _reciprocal_products(squares, eigenvalues, priors)  # [G, m, D_out]
                total += _scaled_grams(per_position(jacobian.columns, n_outputs), scale, diagonal)
            else:
                rows = per_position(jacobian.values, n_outputs)
                if eigenvalues.ndim > 1:
                    eigenvalues = repeated(eigenvalues, m)
                total += _table_grams(rows, eigenvalues, priors, diagonal)
    return total.reshape(len(priors), *lead, *shape[1:])


def _reciprocal_products(squares: Tensor, eigenvalues: Tensor, priors: Tensor) -> Tensor:
    """Σ_j squares_j / (λ_ij + δ_g) [G, m, D_out]; one prior at a time, to hold one table only."""
    return torch.stack([squares @ (eigenvalues + prior).reciprocal().mT for prior in priors])


def _scaled_grams(g: Tensor, scale: Tensor, diagonal: bool) -> Tensor:
    """g̃ diag(scale) g̃ᵀ for every prior, or its diagonal."""
    if diagonal:
        return torch.einsum("mci,gmi->gmc", g.square(), scale)
    return torch.stack([(g * per_prior.unsqueeze(1)) @ g.transpose(1, 2) for per_prior in scale])


def _table_grams(rows: Tensor, eigenvalues: Tensor, priors: Tensor, diagonal: bool) -> Tensor:
    """Σ_k rows_ck rows_c'k / (λ_k + δ_g) as matrix products with the table [K, G] or [m, K, G]."""
    m, n_outputs, _ = rows.shape
    table = (eigenvalues.unsqueeze(-1) + priors).reciprocal()
    if diagonal:
        return (rows.square() @ table).permute(2, 0, 1)
    result = rows.new_empty(m, n_outputs, n_outputs, len(priors))
    for c in range(n_outputs):
        products = (rows[:, c : c + 1] * rows[:, c:]) @ table
        result[:, c, c:] = products
        result[:, c:, c] = products
    return result.permute(3, 0, 1, 2)


def last_layer_sweep(
    feature_pass: FeaturePass,
    likelihood_blocks: NamedBlocks,
    prior_precisions: Tensor,
    inputs: Any,
    *,
    diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`prior_sweep` in the last layer's closed form."""
    with torch.no_grad():
        outputs, features = feature_pass.features(inputs)
        kind = OutputCovariance.DIAGONAL if diagonal else OutputCovariance.PER_SAMPLE
        sweeps = []
        for prior in prior_precisions:
            blocks = NamedBlocks(likelihood_blocks.names, likelihood_blocks.precision + prior)
            sweeps.append(covariance_of_features(feature_pass, blocks, features, kind))
        return outputs, torch.stack(sweeps)
