"""Rows of a last linear layer in closed form: features in, no backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.features import FeaturePass
from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.network.grad_modes import outside_inference_mode


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureRowPass(RowPass):
    """Rows s ⊗ φ of a last layer W φ + b, φ the features of an input.

    Args:
        network: the network, with the last layer's parameters covered.
        byte_budget: working memory of one tile, in bytes.
        feature_pass: gives outputs and features.
    """

    feature_pass: FeaturePass

    def outputs(self, inputs: Any, *, differentiable: bool = False) -> Tensor:
        """Network outputs [m, C]."""
        return self._features(inputs, differentiable)[0]

    def rows(self, inputs: Any, columns: Tensor, *, differentiable: bool = False) -> Tensor:
        """J_nᵀ s [n, r, P] for every sample and every column s of ``columns`` [n, C, r]."""
        features = self._features(inputs, differentiable)[1]
        head = self.feature_pass.head
        with outside_inference_mode(), torch.set_grad_enabled(differentiable):
            columns = columns.to(features)
            parts = {
                head.weight: torch.einsum("ncr,nd->nrcd", columns, features).flatten(2),
                head.bias: columns.mT,
            }
            return torch.cat([parts[name] for name in self.network.names], -1)

    def _features(self, inputs: Any, differentiable: bool) -> tuple[Tensor, Tensor]:
        outputs, features = self.feature_pass.features(inputs, differentiable=differentiable)
        if not differentiable:
            outputs, features = outputs.detach(), features.detach()
        dtype = self.network.dtype
        return outputs.to(dtype), features.to(dtype)
