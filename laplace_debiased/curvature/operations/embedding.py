"""Tables of which a sample reads some rows: a linear map of one-hot inputs, never formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from laplace_debiased.curvature.operations.call import OperationCall, Reading, RuleDefaults
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import Factor
from laplace_debiased.curvature.rows.parameters import TokenRows, token_factor


@dataclass(frozen=True)
class Table:
    """What is to be known of a table [V, D].

    Attributes:
        size: V.
        dtype: of its factors, float32 or better.
        padding: row without a gradient, or None.
        averaged: whether a bag is averaged, and not summed.
    """

    size: int
    dtype: torch.dtype
    padding: int | None = None
    averaged: bool = False

    @classmethod
    def of(cls, weight: Tensor, padding: int | None = None, averaged: bool = False) -> Table:
        """Of a table's weight; a negative ``padding`` counts from its end."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        row = None if padding is None else padding % len(weight)
        return cls(len(weight), dtype, row, averaged)

    def tokens(self, indices: Tensor) -> Tensor:
        """Rows [m, T] of indices [m, ...], negative where there is no gradient."""
        tokens = indices.reshape(len(indices), -1).long()
        tokens = torch.where(tokens < 0, tokens + self.size, tokens)
        return tokens if self.padding is None else tokens.masked_fill(tokens == self.padding, -1)


class EmbeddingRule(RuleDefaults):
    """``embedding`` of integers [m, ...] in a table [V, D]."""

    transposed = True

    def readings(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> tuple[Reading, ...]:
        refused = _refusal("Embedding", max_norm, scale_grad_by_freq)
        table = Table.of(weight, padding_idx)
        return (Reading({"weight": weight}, (input,), table, refused, whole=True),)

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Tokens [m, ...], columns [m, R, ..., D]."""
        m, n, width = *columns[0].shape[:2], columns[0].shape[-1]
        g = columns[0].reshape(m, n, -1, width)
        table: Table = call.settings
        return TokenRows(table.tokens(call.inputs[0]), g, table.size)

    def input_factor(
        self, call: OperationCall, slot: str, counts: Tensor | None = None
    ) -> Factor | None:
        """How often each token is read: the covariance of one-hot vectors is diagonal."""
        table: Table = call.settings
        tokens = table.tokens(call.inputs[0])
        if counts is None:
            counts = torch.ones(len(tokens), dtype=table.dtype, device=tokens.device)
        return token_factor(tokens, table.size, counts)


def _refusal(kind: str, max_norm: float | None, scale_grad_by_freq: bool) -> str | None:
    if max_norm is not None:
        return f"{kind} with max_norm overwrites its weight in the forward pass"
    if scale_grad_by_freq:
        return f"{kind} with scale_grad_by_freq has gradients that depend on the batch"
    return None


class RowIndexRule(EmbeddingRule):
    """``table[index]`` of integers."""

    def readings(self, input: Tensor, index: Any) -> tuple[Reading, ...]:  # type: ignore[override]
        """As ``Tensor.__getitem__`` takes them."""
        if isinstance(index, tuple) and len(index) == 1:
            (index,) = index
        integers = isinstance(index, Tensor) and not (
            index.is_floating_point() or index.dtype in (torch.bool, torch.uint8)
        )
        if not integers or input.ndim != 2 or index.ndim == 0:
            return ()
        return (Reading({"weight": input}, (index,), Table.of(input), whole=True),)


class EmbeddingBagRule(EmbeddingRule):
    """``embedding_bag`` of as many integers [m, T] for every sample, summed or averaged."""

    def readings(  # type: ignore[override]
        self,
        input: Tensor,
        weight: Tensor,
        offsets: Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> tuple[Reading, ...]:
        if input.ndim != 2 or mode == "max":  # bags of different lengths; no linear map
            return ()
        refused = _refusal("EmbeddingBag", max_norm, scale_grad_by_freq)
        inputs = (input,) if per_sample_weights is None else (input, per_sample_weights)
        table = Table.of(weight, padding_idx, mode == "mean")
        return (Reading({"weight": weight}, inputs, table, refused, whole=True),)

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Tokens [m, T], columns [m, R, D], once for every token of a bag."""
        table: Table = call.settings
        tokens = table.tokens(call.inputs[0])
        shares = (tokens >= 0).to(columns[0])
        if table.averaged:
            shares = shares / shares.sum(1, keepdim=True).clamp_min(1)
        if len(call.inputs) == 2:
            shares = shares * call.inputs[1]
        g = columns[0].unsqueeze(2) * shares[:, None, :, None]
        return TokenRows(tokens, g, table.size)


RULES: dict[Any, EmbeddingRule] = {
    functional.embedding: EmbeddingRule(),
    functional.embedding_bag: EmbeddingBagRule(),
    Tensor.__getitem__: RowIndexRule(),
}
