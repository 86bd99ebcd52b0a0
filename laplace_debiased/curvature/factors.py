"""Kronecker factors and directional curvatures of a plan's folds, through our own pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.curvature.kernels import (
    bias_curvature,
    input_covariance,
    output_covariance,
    weight_curvature,
)
from laplace_debiased.curvature.layers import Layer
from laplace_debiased.curvature.passes import LayerRows
from laplace_debiased.errors import NumericalError


@dataclass(frozen=True, eq=False)
class BlockFactors:
    """Kronecker factors of one parameter tensor: *means over samples* of the K-FAC sums.

    Attributes:
        name: qualified parameter name.
        output: B [D_out, D_out]. Weights: mean_n Σ_{r,t} g gᵀ. Biases: the same (K-FAC), or
            mean_n Σ_r (Σ_t g)(Σ_t g)ᵀ where cross-position terms are kept ("ggn" magnitudes).
        input: A [D_in, D_in] = mean_{n,t} a aᵀ; None for biases.
    """

    name: str
    output: Tensor
    input: Tensor | None = None

    @property
    def numel(self) -> int:
        """Number of parameter entries of the block."""
        return len(self.output) * (1 if self.input is None else len(self.input))


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Factors of all covered parameters, with the number of samples they are means over.

    Attributes:
        blocks: one per covered parameter tensor, in the order of the coverage.
        n_samples: draws over which the means were taken (float: weights after merging fits).
    """

    blocks: tuple[BlockFactors, ...]
    n_samples: float

    @staticmethod
    def merge(parts: Sequence[KroneckerFactors]) -> KroneckerFactors:
        """Factors of the union of disjoint samples: means weighted by the number of samples.

        Raises:
            ValueError: if the parts describe different parameters.
        """
        first = parts[0]
        if any(
            [block.name for block in part.blocks] != [block.name for block in first.blocks]
            for part in parts
        ):
            raise ValueError("cannot merge Kronecker factors of different parameters.")
        total = sum(part.n_samples for part in parts)
        shares = [part.n_samples / total for part in parts]
        blocks = tuple(
            BlockFactors(
                group[0].name,
                sum_weighted([block.output for block in group], shares),
                None
                if group[0].input is None
                else sum_weighted([b.input for b in group if b.input is not None], shares),
            )
            for group in zip(*(part.blocks for part in parts), strict=True)
        )
        return KroneckerFactors(blocks, total)


def sum_weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k weights_k tensors_k."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


class FactorAccumulator:
    """Adds up the factors of one fold, chunk by chunk; ``means`` closes it.

    Args:
        names: covered parameters, in order.
        summed_bias: whether a bias factor sums over positions before the outer product.
    """

    def __init__(self, names: Sequence[str], *, summed_bias: bool) -> None:
        self._names = tuple(names)
        self._summed_bias = summed_bias
        self._outputs: dict[str, Tensor] = {}
        self._inputs: dict[str, Tensor] = {}

    def add_inputs(self, layer: Layer, inputs: Tensor, counts: Tensor | None = None) -> None:
        """Add a layer's inputs to the factor A of its weight.

        Args:
            layer: the layer.
            inputs: what its module was called with, m samples.
            counts: multiplicity of every sample [m]; None for ones.
        """
        if layer.weight is not None:
            covariance = layer.rule.input_covariance(layer.module, inputs, counts)
            _add_to(self._inputs, layer.weight, covariance)

    def add_column(self, layer: Layer, cotangents: Tensor) -> None:
        """Add one back-propagated column to the factors B.

        Args:
            layer: the layer.
            cotangents: gradients in its module's output, each scaled by the square root of its
                sample's weight.
        """
        g = layer.rule.output_positions(layer.module, cotangents).unsqueeze(1)
        covariance = output_covariance(g)
        if layer.weight is not None:
            _add_to(self._outputs, layer.weight, covariance)
        if layer.bias is not None:
            if self._summed_bias and g.shape[2] > 1:
                covariance = output_covariance(g.sum(2, keepdim=True))
            _add_to(self._outputs, layer.bias, covariance)

    def add_rows(self, layer: Layer, rows: LayerRows) -> None:
        """Add rows of weight one, all columns at once."""
        if layer.weight is not None and rows.inputs is not None:
            _add_to(self._inputs, layer.weight, input_covariance(rows.inputs))
            _add_to(self._outputs, layer.weight, output_covariance(rows.columns))
        if layer.bias is not None:
            columns = rows.columns.sum(2, keepdim=True) if self._summed_bias else rows.columns
            _add_to(self._outputs, layer.bias, output_covariance(columns))

    def means(self, n_samples: float) -> KroneckerFactors:
        """Per-sample means over ``n_samples`` draws.

        Raises:
            RuntimeError: if a covered parameter never affected an output.
        """
        blocks = []
        for name in self._names:
            if name not in self._outputs:
                raise RuntimeError(
                    f"parameter {name!r} did not affect the model's outputs on any sample of a "
                    "fold; freeze it with requires_grad_(False)."
                )
            inputs = self._inputs.get(name)
            blocks.append(
                BlockFactors(
                    name,
                    self._outputs[name] / n_samples,
                    None if inputs is None else inputs / n_samples,
                )
            )
        return KroneckerFactors(tuple(blocks), n_samples)


@dataclass(frozen=True, eq=False)
class BlockBasis:
    """Eigenbasis of one block's factors, eigenvalues ascending.

    Attributes:
        name: qualified parameter name.
        output_basis: U_B [D_out, D_out].
        output_eigenvalues: [D_out], of the mean factor B.
        input_basis: U_A [D_in, D_in], or None.
        input_eigenvalues: [D_in], of the mean factor A, or None.
    """

    name: str
    output_basis: Tensor
    output_eigenvalues: Tensor
    input_basis: Tensor | None = None
    input_eigenvalues: Tensor | None = None

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Shape of the block's eigenvalue table."""
        outs = len(self.output_eigenvalues)
        return (outs,) if self.input_basis is None else (outs, len(self.input_basis))


class MagnitudeAccumulator:
    """Adds up directional curvatures Σ_n c_n Σ_r (uᵀ row_{n,r})² along one eigenbasis."""

    def __init__(self, basis: Iterable[BlockBasis]) -> None:
        self._basis = {block.name: block for block in basis}
        self._tables: dict[str, Tensor] = {}

    def add(self, layer: Layer, rows: LayerRows, coefficients: Tensor) -> None:
        """Add one layer's rows with coefficients c [m]."""
        if layer.weight is not None and rows.inputs is not None:
            block = self._basis[layer.weight]
            assert block.input_basis is not None
            table = weight_curvature(
                rows.inputs, rows.columns, block.output_basis, block.input_basis, coefficients
            )
            _add_to(self._tables, layer.weight, table)
        if layer.bias is not None:
            basis = self._basis[layer.bias].output_basis
            _add_to(self._tables, layer.bias, bias_curvature(rows.columns, basis, coefficients))

    def tables(self) -> tuple[Tensor, ...]:
        """One eigenvalue table per block, in the order of the basis."""
        return tuple(
            self._tables.get(name, block.output_basis.new_zeros(block.table_shape))
            for name, block in self._basis.items()
        )


def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = value if name not in sums else sums[name] + value


def select_samples(rows: LayerRows, index: Tensor | slice) -> LayerRows:
    """The rows of some samples of a chunk."""
    inputs = None if rows.inputs is None else rows.inputs[index]
    return LayerRows(inputs, rows.columns[index])


def require_finite(name: str, tensor: Tensor, what: str) -> None:
    """Check a curvature before it is decomposed.

    Raises:
        NumericalError: naming the layer, if it holds NaN or infinity.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(
            f"the {what} of parameter {name!r} is NaN or infinite. Check the data and the weights; "
            "with half-precision models, overflow in the backward pass is the usual cause."
        )
