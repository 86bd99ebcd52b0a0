"""Embedding tables: a linear layer of one-hot inputs that are never formed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.layers import LayerCall, RuleDefaults
from laplace_debiased.curvature.rows import LayerRows, TokenRows, token_factor


class EmbeddingRule(RuleDefaults):
    """``nn.Embedding`` on integers [m, ...]; its weight is [V, D]."""

    transposed = True

    def unsupported(self, module: nn.Module) -> str | None:
        """Tables that are renormalised, or whose gradients depend on the batch."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "Embedding with max_norm overwrites its weight in the forward pass"
        if module.scale_grad_by_freq:
            return "Embedding with scale_grad_by_freq has gradients that depend on the batch"
        return None

    def rows(self, module: nn.Module, call: LayerCall) -> LayerRows:
        """Tokens [m, ...], columns [m, R, ..., D]."""
        assert isinstance(module, nn.Embedding)
        (tokens,), (columns,) = call.inputs, call.columns
        m, n = columns.shape[:2]
        if tokens.shape[0] != m:
            raise ValueError("Embedding got an input without a batch dimension.")
        g = columns.reshape(m, n, -1, columns.shape[-1])
        return LayerRows(TokenRows(_tokens(module, tokens), g, module.num_embeddings), None)

    def input_factor(
        self,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        counts: Tensor | None = None,
    ) -> Tensor:
        """How often each token is read: the covariance of one-hot vectors is diagonal."""
        assert isinstance(module, nn.Embedding)
        if counts is None:
            dtype = torch.promote_types(module.weight.dtype, torch.float32)
            counts = torch.ones(len(inputs[0]), dtype=dtype, device=inputs[0].device)
        tokens = _tokens(module, inputs[0])
        return token_factor(tokens, module.num_embeddings, counts)


def _tokens(module: nn.Embedding, tokens: Tensor) -> Tensor:
    """Tokens [m, T], negative where the table's row has no gradient."""
    tokens = tokens.reshape(len(tokens), -1).long()
    if module.padding_idx is None:
        return tokens
    return tokens.masked_fill(tokens == module.padding_idx, -1)
