"""The rows of one layer: its weight and its bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from laplace_debiased.curvature.rows.base import BlockRows, FactorRule
from laplace_debiased.curvature.rows.matrix import MatrixRows
from laplace_debiased.curvature.rows.vectors import BiasRows


@dataclass(frozen=True, eq=False)
class LayerRows:
    """One layer's share of a chunk.

    Attributes:
        weight: rows of its weight; None where that is not covered.
        bias: rows of its bias; None where that is not covered.
    """

    weight: BlockRows | None
    bias: BlockRows | None

    @property
    def columns(self) -> Tensor:
        """The back-propagated columns of either block: for their device and dtype."""
        block = self.bias if self.weight is None else self.weight
        assert block is not None
        return block.columns

    def blocks(self) -> Iterator[tuple[str, BlockRows]]:
        """The covered blocks with the part of the layer that they are: "weight" or "bias"."""
        if self.weight is not None:
            yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias

    def select(self, index: Tensor | slice) -> LayerRows:
        """The rows of some samples."""
        return LayerRows(
            None if self.weight is None else self.weight.select(index),
            None if self.bias is None else self.bias.select(index),
        )

    @staticmethod
    def join(calls: Sequence[LayerRows]) -> LayerRows:
        """Rows of a module that was called several times."""
        first, others = calls[0], calls[1:]
        if not others:
            return first
        weights = [call.weight for call in others if call.weight is not None]
        biases = [call.bias for call in others if call.bias is not None]
        return LayerRows(
            None if first.weight is None else first.weight.joined(weights),
            None if first.bias is None else first.bias.joined(biases),
        )


def same_column_factor(rows: LayerRows, rule: FactorRule) -> bool:
    """Whether weight and bias have one column factor, as in K-FAC or with a single position."""
    weight, bias = rows.weight, rows.bias
    return (
        isinstance(weight, MatrixRows)
        and isinstance(bias, BiasRows)
        and weight.columns is bias.columns
        and (not rule.summed_bias or bias.columns.shape[2] == 1)
    )
