r"""Covariance of the linearised network's outputs under a Kronecker posterior, without Jacobians.

For a block with eigenbasis U = U_B ⊗ U_A and precision table τ (= h·N·λ + δ),

    Cov[f_c, f_c'] = Σ_ij J̃_c,ij J̃_c',ij / τ_ij,     J̃ = U_Bᵀ (Σ_t g aᵀ) U_A,

summed over blocks: one forward pass and C backward passes, one layer at a time, chunked over
samples. No array of size batch × C × P exists. A layer with a single position has
J̃_c = (U_Bᵀ g_c)(U_Aᵀ a)ᵀ, so that the sum over j can be taken first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_debiased.curvature.passes import (
    Chunk,
    CurvaturePass,
    identity_columns,
)
from laplace_debiased.curvature.rows import (
    PositionRows,
    RankOneRows,
    RotatedRows,
)
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import batch_length
from laplace_debiased.operators import EigenBlock, EigenKron
from laplace_debiased.predictive.predictor import OutputCovariance, OutputMoments
from laplace_debiased.predictive.selection import (
    ALL_OUTPUTS,
    OutputSelection,
    SelectedChunk,
    selected_walks,
)


@dataclass(frozen=True, eq=False)
class NamedBlocks:
    """A Kronecker posterior's blocks by parameter name, and the prior precision of each.

    Args:
        names: covered parameters, in the order of the blocks.
        precision: the posterior precision (sum over data, prior added).
    """

    names: tuple[str, ...]
    precision: EigenKron

    def block(self, name: str) -> EigenBlock:
        """Eigenbasis of a parameter's block."""
        return self.precision.blocks[self.names.index(name)]

    def output_basis(self, name: str) -> Tensor:
        """U_B [D_out, D_out], or thin, of a parameter's block."""
        basis = self.block(name).output_basis
        assert basis is not None
        return basis

    def input_basis(self, name: str) -> Tensor:
        """U_A [D_in, D_in], or thin, of a weight's block."""
        basis = self.block(name).input_basis
        assert basis is not None
        return basis

    def table(self, name: str) -> Tensor:
        """Posterior precision along each eigenvector of a parameter's block."""
        index = self.names.index(name)
        deltas = self.precision.deltas
        delta = deltas[index] if deltas.numel() > 1 else deltas.reshape(())
        return self.precision.blocks[index].eigenvalues + delta


def rotated_jacobians(
    chunk: Chunk, blocks: NamedBlocks
) -> Iterator[tuple[str, RotatedRows | RankOneRows | PositionRows]]:
    """Jacobian rows of a chunk's blocks in their eigenbases, by parameter name.

    Where J̃ is a product of two factors g̃ [m, C, D_out] and ã [m, D_in] (a weight with a single
    position) these are given instead; where a sample touches few rows of a table, only those;
    where a basis is thin, what J̃ is made of.
    """
    for name, rows in chunk.blocks:
        yield name, rows.rotated(blocks.block(name))


def whitened(jacobian: RotatedRows | RankOneRows, table: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows X with X Xᵀ the block's share of the covariance.

    Returns:
        (X [m, C, K], None) in general; (g̃ [m, C, K], s [m, K]) where the covariance is
        g̃ diag(s) g̃ᵀ (single position).
    """
    entries = jacobian.entries(table)
    if isinstance(jacobian, RankOneRows):
        return jacobian.columns, jacobian.scales(entries)
    return jacobian.values * _per_sample(entries.rsqrt()), None


def _per_sample(entries: Tensor) -> Tensor:
    """Entries [K] or [m, K] to broadcast against rows [m, C, K]."""
    return entries if entries.ndim == 1 else entries.unsqueeze(1)


def functional_moments(
    curvature_pass: CurvaturePass,
    blocks: NamedBlocks,
    inputs: Any,
    covariance: OutputCovariance,
    selection: OutputSelection = ALL_OUTPUTS,
    *,
    differentiable: bool = False,
) -> OutputMoments:
    """Mean and covariance of the linearised outputs.

    Args:
        curvature_pass: the pass over the network.
        blocks: the posterior.
        inputs: one batch of model inputs, m samples.
        covariance: how much of it; a joint one is of all outputs.
        selection: of which outputs.
        differentiable: keep the graph, for gradients with respect to ``inputs``.
    """
    match covariance:
        case OutputCovariance.JOINT:
            return OutputMoments(*_joint(curvature_pass, blocks, inputs, differentiable))
        case OutputCovariance.DIAGONAL | OutputCovariance.PER_SAMPLE:
            diagonal = covariance is OutputCovariance.DIAGONAL
    groups = []
    for walk in selected_walks(curvature_pass, inputs, selection, differentiable=differentiable):
        outputs, covariances, indices = [], [], []
        for part in walk:
            with outside_inference_mode(), torch.set_grad_enabled(differentiable):
                outputs.append(part.outputs)
                covariances.append(_chunk_covariance(part, blocks, diagonal))
                indices.append(part.chosen)
        groups.append((torch.cat(outputs), torch.cat(covariances), joined(indices)))
    mean, variance, chosen = zip(*groups, strict=True)
    with torch.set_grad_enabled(differentiable):
        return OutputMoments(beside(mean, 1), beside(variance, 1), joined(chosen, 1))


def joined(indices: Sequence[Tensor | None], dim: int = 0) -> Tensor | None:
    """Indices of chunks as one; None where all outputs are meant."""
    known = [index for index in indices if index is not None]
    return beside(known, dim) if known else None


def beside(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts along an axis; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _chunk_covariance(part: SelectedChunk, blocks: NamedBlocks, diagonal: bool) -> Tensor:
    *lead, n_outputs = part.shape
    m = math.prod(lead)
    shape = (m, n_outputs) if diagonal else (m, n_outputs, n_outputs)
    total = part.outputs.new_zeros(shape)
    for name, jacobian in rotated_jacobians(part.chunk, blocks):
        block = _block_covariance(jacobian, blocks.table(name), shape, diagonal)
        total = total + block.reshape(shape)
    return total.reshape(*lead, *shape[1:])


def _block_covariance(
    jacobian: RotatedRows | RankOneRows | PositionRows,
    table: Tensor,
    shape: tuple[int, ...],
    diagonal: bool,
) -> Tensor:
    m, n_outputs = shape[:2]
    if isinstance(jacobian, PositionRows):
        weights = table.reciprocal().unsqueeze(0)
        return jacobian.per_position(n_outputs).covariances(weights, diagonal=diagonal)[0]
    rows, scale = whitened(jacobian, table)
    rows = per_position(rows, n_outputs)
    scale = None if scale is None else repeated(scale, m)
    if diagonal:
        squares = rows.square()
        return squares.sum(-1) if scale is None else squares @ scale.unsqueeze(-1)
    left = rows if scale is None else rows * scale.unsqueeze(1)
    return left @ rows.transpose(1, 2)


def per_position(rows: Tensor, n_outputs: int) -> Tensor:
    """Rows [m, T·C, ...] of samples with outputs at T positions, as rows [m·T, C, ...].

    Positions share the weights, so their outputs are correlated; only the covariance at each
    position is wanted.
    """
    return rows.reshape(-1, n_outputs, *rows.shape[2:])


def repeated(values: Tensor, length: int) -> Tensor:
    """Per-sample values [m, ...], once for every position of a sample [length, ...]."""
    if len(values) == length:
        return values
    return values.repeat_interleave(length // len(values), dim=0)


def _joint(
    curvature_pass: CurvaturePass, blocks: NamedBlocks, inputs: Any, differentiable: bool
) -> tuple[Tensor, Tensor]:
    """Covariance across samples; where they fill several chunks, every pair of chunks is visited.

    Rows are recomputed for each pair: what is held at a time are the rows of two chunks.
    """

    def walk() -> Iterator[tuple[Chunk, list[JointRows]]]:
        for chunk in curvature_pass.chunks(inputs, identity_columns, differentiable=differentiable):
            with outside_inference_mode(), torch.set_grad_enabled(differentiable):
                rows = _joint_rows(chunk, blocks)
            yield chunk, rows

    length = batch_length(inputs)
    outputs, bands = [], []
    for chunk, left in walk():
        whole = chunk.rows == slice(0, length)
        others = (left,) if whole else (right for _, right in walk())
        with outside_inference_mode(), torch.set_grad_enabled(differentiable):
            outputs.append(chunk.outputs)
            band = [sum_of_products(left, right) for right in others]
            bands.append(torch.cat(band, dim=1))
    return torch.cat(outputs), torch.cat(bands)


@dataclass(frozen=True, eq=False)
class JointRows:
    """Whitened Jacobian rows of one block for every sample and output.

    Attributes:
        values: [m·C, K], or [m·C, V', D] where only some rows of a table are touched.
        touched: which rows of the table these V' are, or None.
    """

    values: Tensor
    touched: Tensor | None = None

    @classmethod
    def of(cls, jacobian: RotatedRows, table: Tensor) -> JointRows:
        """From one block's rotated rows and its precision table."""
        whitened = jacobian.values * _per_sample(jacobian.entries(table).rsqrt())
        if jacobian.touched is None:
            return cls(whitened.flatten(0, 1))
        touched, place = jacobian.touched.unique(return_inverse=True)
        m, n_outputs = whitened.shape[:2]
        rows = whitened.unflatten(2, (place.shape[1], -1))
        values = rows.new_zeros(m, n_outputs, len(touched), rows.shape[-1])
        index = place[:, None, :, None].expand_as(rows)
        return cls(values.scatter_add(2, index, rows).flatten(0, 1), touched)

    def product(self, other: JointRows) -> Tensor:
        """Inner products [m·C, m'·C] over the block's parameters."""
        if self.touched is None or other.touched is None:
            return self.values @ other.values.T
        mine, theirs = (self.touched[:, None] == other.touched).nonzero(as_tuple=True)
        return self.values[:, mine].flatten(1) @ other.values[:, theirs].flatten(1).T


def sum_of_products(left: list[JointRows], right: list[JointRows]) -> Tensor:
    """Σ_b left_b right_bᵀ over blocks."""
    total = left[0].product(right[0])
    for x, y in zip(left[1:], right[1:], strict=True):
        total = total + x.product(y)
    return total


def _joint_rows(chunk: Chunk, blocks: NamedBlocks) -> list[JointRows]:
    """Whitened Jacobian rows of every block of a chunk."""
    rows = []
    for name, jacobian in rotated_jacobians(chunk, blocks):
        written = jacobian if isinstance(jacobian, RotatedRows) else jacobian.expanded()
        rows.append(JointRows.of(written, blocks.table(name)))
    return rows
