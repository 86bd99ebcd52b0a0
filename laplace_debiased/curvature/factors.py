"""Kronecker factors and directional curvatures of a plan's folds, through our own pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.operations.call import (
    Cotangents,
    OperationCall,
    parameter_rows,
    uses_of,
)
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import (
    Factor,
    FactorSum,
    RowsFactor,
    dense,
    scaled,
)
from laplace_debiased.curvature.rows.parameters import BiasRows, MatrixRows, MixedRows
from laplace_debiased.curvature.rows.sides import mean_energies, table_multiplicities
from laplace_debiased.errors import NumericalError


@dataclass(frozen=True, eq=False)
class BlockFactors:
    """Kronecker factors of one parameter tensor: *means over samples* of the K-FAC sums.

    Attributes:
        name: qualified parameter name.
        output: B [D_out, D_out], for the rows of the parameter as a matrix. Weights: mean_n
            Σ_{r,t} g gᵀ. Biases: the same (K-FAC), or mean_n Σ_r (Σ_t g)(Σ_t g)ᵀ where
            cross-position terms are kept ("ggn" magnitudes).
        input: A [D_in, D_in] = mean_{n,t} a aᵀ, for its columns; None where the parameter is a
            vector.

    A factor that is a sum over fewer rows than its side is kept as these rows. Where a weight is
    stored as [D_in, D_out] the two change places. Weights of G groups have G matrices each,
    [G, D, D]. A vector [D] is a diagonal factor.
    """

    name: str
    output: Factor
    input: Factor | None = None


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

        def mean(factors: Sequence[Factor | None]) -> Factor | None:
            found = FactorSum()
            for factor, part in zip(factors, parts, strict=True):
                if factor is None:
                    return None
                found.add(scaled(factor, part.n_samples / total))
            return found.value()

        blocks = []
        for group in zip(*(part.blocks for part in parts), strict=True):
            output = mean([block.output for block in group])
            assert output is not None
            blocks.append(BlockFactors(group[0].name, output, mean([b.input for b in group])))
        return KroneckerFactors(tuple(blocks), total)


class FactorAccumulator:
    """Adds up the factors of one fold, chunk by chunk; ``means`` closes it.

    A parameter that several calls read has, on either side, the sum of their columns' factors and
    the mean of their inputs' factors. A table that is a linear map elsewhere (a tied embedding and
    head) adds its tokens to the side of the map's columns and its columns to that of the map's
    inputs. Eigenbases of these factors are as good as any for "ggn" magnitudes, which are exact
    along them; as "kfac" magnitudes their products also hold terms across the two.

    Args:
        names: covered parameters, in order.
        summed_bias: whether a bias factor sums over positions before the outer product.
        thin: whether factors of few rows are kept as these rows.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        summed_bias: bool,
        thin: bool = False,
    ) -> None:
        self._names = tuple(names)
        self._summed_bias = summed_bias
        self._thin = thin
        self._sums: dict[tuple[str, str], FactorSum] = defaultdict(FactorSum)

    def add_inputs(self, calls: Sequence[OperationCall], counts: Tensor | None = None) -> None:
        """Add what calls read to the factors of the parameters that act on it.

        Args:
            calls: of m samples.
            counts: multiplicity of every sample [m]; None for ones.
        """
        for name, places in uses_of(calls).items():
            if len({calls[index].uses[slot].place.shape for index, slot in places}) > 1:
                continue  # written out as a vector, which has no inputs
            sides = [calls[index].inputs_act_on_rows(slot) for index, slot in places]
            for (index, slot), on_rows in zip(places, sides, strict=True):
                factor = calls[index].input_factor(slot, counts)
                if factor is not None:
                    mean = factor if len(sides) == 1 else scaled(factor, 1 / sides.count(on_rows))
                    self._add("rows" if on_rows else "columns", name, mean)

    def add_columns(self, calls: Sequence[OperationCall], columns: Sequence[Cotangents]) -> None:
        """Add back-propagated columns to the factors of the parameters' columns.

        Args:
            calls: of m samples.
            columns: gradients in what every call wrote [m, R, ...], each scaled by the square root
                of its sample's weight.
        """
        latest: tuple[Tensor, Factor] | None = None  # weight and bias often have one factor
        for name, places in uses_of(calls).items():
            rows = parameter_rows(calls, places, columns)
            if rows is None:
                continue
            for part in rows.parts if isinstance(rows, MixedRows) else (rows,):
                is_gram = self._is_gram(part)
                if is_gram and latest is not None and _is_same_memory(part.columns, latest[0]):
                    factor = latest[1]
                else:
                    factor = part.column_factor(summed_bias=self._summed_bias)
                    latest = (part.columns, factor) if is_gram else latest
                self._add("columns" if part.transposed else "rows", name, factor)

    def _is_gram(self, rows: BlockRows) -> bool:
        """Whether a factor of columns is their plain Gram matrix."""
        if isinstance(rows, BiasRows):
            return not self._summed_bias or rows.columns.shape[2] == 1
        return type(rows) is MatrixRows

    def _add(self, side: str, name: str, factor: Factor) -> None:
        self._sums[side, name].add(factor if self._thin else dense(factor))

    def factors(self) -> dict[tuple[str, str], Factor]:
        """The sums so far, by side ("rows" or "columns" of the parameter as a matrix) and name."""
        return {key: total.value() for key, total in self._sums.items()}

    def replace(self, factors: Mapping[tuple[str, str], Factor]) -> None:
        """Take other sums for those so far."""
        self._sums.clear()
        for key, factor in factors.items():
            self._sums[key].add(factor)

    def state(self) -> dict[str, Any]:
        """The sums so far: tensors and plain values, to be given to :meth:`restore`."""
        state: dict[str, Any] = {"rows": {}, "columns": {}}
        for (side, name), factor in self.factors().items():
            kept = {"rows": factor.rows} if isinstance(factor, RowsFactor) else factor
            state[side][name] = kept
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what another's :meth:`state` holds."""
        for side, factors in state.items():
            for name, kept in factors.items():
                factor = RowsFactor(kept["rows"]) if isinstance(kept, Mapping) else kept
                self._sums[side, name].add(factor)

    def means(self, n_samples: float) -> KroneckerFactors:
        """Per-sample means over ``n_samples`` draws.

        Raises:
            RuntimeError: if a covered parameter never affected an output.
        """
        means = {key: scaled(factor, 1 / n_samples) for key, factor in self.factors().items()}
        for name in self._names:
            if ("rows", name) not in means:
                raise RuntimeError(
                    f"parameter {name!r} did not affect the model's outputs on any sample of a "
                    "fold; freeze it with requires_grad_(False)."
                )
        blocks = [BlockFactors(n, means["rows", n], means.get(("columns", n))) for n in self._names]
        return KroneckerFactors(tuple(blocks), n_samples)


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride()) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
    )


@dataclass(frozen=True, eq=False)
class BlockBasis:
    """Eigenbasis of one block's factors, eigenvalues ascending.

    Attributes:
        name: qualified parameter name.
        output_basis: U_B [D_out, D_out] or [G, D_out, D_out]; None for the identity, where the
            factor is a diagonal (its eigenvalues are then in the order of the parameter).
        output_eigenvalues: [D_out] or [G, D_out], of the mean factor B.
        input_basis: U_A [D_in, D_in] or [G, D_in, D_in]; None for the identity, or for a vector.
        input_eigenvalues: [D_in] or [G, D_in], of the mean factor A; None for a vector.

    A side is thin where its basis has r < D columns (see :mod:`curvature.rows.sides`). Its
    eigenvalues, and its side of the table, then have r + 1 entries: the last is the mean over all
    directions outside of the basis.
    """

    name: str
    output_basis: Tensor | None
    output_eigenvalues: Tensor
    input_basis: Tensor | None = None
    input_eigenvalues: Tensor | None = None

    @property
    def table_shape(self) -> tuple[int, ...]:
        """Shape of the block's eigenvalue table."""
        shape = tuple(self.output_eigenvalues.shape)
        return (
            shape if self.input_eigenvalues is None else (*shape, self.input_eigenvalues.shape[-1])
        )

    def multiplicities(self) -> Tensor:
        """Number of directions that every entry of the table stands for."""
        table = self.output_eigenvalues.new_ones(self.table_shape)
        return table_multiplicities(table, self.output_basis, self.input_basis)


class MagnitudeAccumulator:
    """Adds up directional curvatures Σ_n c_n Σ_r (uᵀ row_{n,r})² along one eigenbasis."""

    def __init__(self, basis: Iterable[BlockBasis]) -> None:
        self._basis = {block.name: block for block in basis}
        self.sums = {
            name: block.output_eigenvalues.new_zeros(block.table_shape)
            for name, block in self._basis.items()
        }

    def add(self, name: str, rows: BlockRows, coefficients: Tensor) -> None:
        """Add a parameter's rows with coefficients c [m]."""
        self.sums[name] += rows.curvature(self._basis[name], coefficients)

    def state(self) -> dict[str, Any]:
        """The sums so far, to be given to :meth:`restore`."""
        return {"tables": dict(self.sums)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Add what another's :meth:`state` holds."""
        for name, table in state["tables"].items():
            self.sums[name] += table

    def tables(self) -> tuple[Tensor, ...]:
        """One eigenvalue table per block, in the order of the basis; means over complements."""
        return tuple(self._means(block) for block in self._basis.values())

    def _means(self, block: BlockBasis) -> Tensor:
        if block.input_eigenvalues is None:
            return mean_energies(self.sums[block.name], block.output_basis)
        means = mean_energies(self.sums[block.name], block.input_basis)
        return mean_energies(means, block.output_basis, dim=-2)


def require_finite(name: str, factor: Factor, what: str) -> None:
    """Check a curvature before it is decomposed.

    Raises:
        NumericalError: naming the layer, if it holds NaN or infinity.
    """
    tensor = factor.rows if isinstance(factor, RowsFactor) else factor
    if not bool(torch.isfinite(tensor).all()):
        raise NumericalError(
            f"the {what} of parameter {name!r} is NaN or infinite. Check the data and the weights; "
            "with half-precision models, overflow in the backward pass is the usual cause."
        )
