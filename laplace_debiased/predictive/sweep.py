r"""Output covariances for a whole grid of prior precisions from one pass.

J̃ does not depend on the prior precision δ, and Cov[f_c, f_c'] = Σ_ij J̃_c,ij J̃_c',ij /(hNλ_ij + δ)
is linear in the table 1/(hNλ + δ): for G priors it is one matrix product per layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature import CurvaturePass
from laplace_debiased.curvature.rows import Weights
from laplace_debiased.predictive.covariances import Products
from laplace_debiased.predictive.functional import NamedBlocks, beside, joined
from laplace_debiased.predictive.predictor import Sweep
from laplace_debiased.predictive.selection import ALL_OUTPUTS, OutputSelection, selected_walks


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

    def weights(name: str) -> Weights:
        return Weights(likelihood_blocks.block(name).eigenvalues, priors, alone=True)

    products = Products(likelihood_blocks.block, weights, len(priors) + 1, diagonal)
    groups = []
    for walk in selected_walks(curvature_pass, inputs, selection, likelihood_blocks.bases):
        outputs, covariances, indices = [], [], []
        for part in walk:
            with torch.no_grad():
                outputs.append(part.outputs.detach())
                covariances.append(products.of(part))
                indices.append(part.chosen)
        groups.append((torch.cat(outputs), torch.cat(covariances, dim=1), joined(indices)))
    mean, swept, chosen = zip(*groups, strict=True)
    whole = beside(swept, 2)
    return Sweep(beside(mean, 1), whole[:-1], whole[-1], joined(chosen, 1))
