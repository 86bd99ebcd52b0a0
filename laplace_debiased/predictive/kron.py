r"""Predictions of a Kronecker curvature over all weights, without Jacobians.

For a block with eigenbasis U = U_B ⊗ U_A and precision table τ (= h·N·λ + δ),

    Cov[f_c, f_c'] = Σ_ij J̃_c,ij J̃_c',ij / τ_ij,     J̃ = U_Bᵀ (Σ_t g aᵀ) U_A,

summed over blocks: one forward pass and C backward passes, one layer at a time, chunked over
samples. No array of size batch × C × P exists. A layer with a single position has
J̃_c = (U_Bᵀ g_c)(U_Aᵀ a)ᵀ, so that the sum over j can be taken first. For G priors it is one matrix
product per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.curvature import BackwardPass, Chunk, CurvaturePass, identity_columns
from laplace_debiased.curvature.rows.rotated import RotatedRows, Weights
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import batch_length
from laplace_debiased.operators import EigenKron
from laplace_debiased.predictive.covariances import Products
from laplace_debiased.predictive.predictor import Ask, OutputMoments, Predictor


@dataclass(frozen=True, eq=False)
class KronPredictor(Predictor):
    """A Kronecker curvature with the network that it belongs to.

    Attributes:
        engine: the pass over the network.
        names: covered parameters, in the order of the blocks.
        curvature: N·λ in its eigenbasis (a sum over the training set).
    """

    engine: CurvaturePass
    names: tuple[str, ...]
    curvature: EigenKron

    def precision(self, h: Tensor, prior: Tensor) -> EigenKron:
        """h·N·λ + δ, per block."""
        return self.curvature * h + prior

    def under(self, ask: Ask, precision: EigenKron, priors: Tensor | None = None) -> OutputMoments:
        """See :class:`Predictor`."""
        if ask.joint:
            return self._joint(ask, precision)
        assert isinstance(self.engine, BackwardPass)
        bases = dict(zip(self.names, precision.blocks, strict=True))
        n_weights = 1 if priors is None else len(priors) + 1
        return Products(bases, self.weights(precision, priors), n_weights, ask).moments(self.engine)

    def weights(self, precision: EigenKron, priors: Tensor | None) -> dict[str, Weights]:
        """What products of rows along each eigenvector count: the posterior variance."""
        return {
            name: Weights(
                block.eigenvalues,
                delta.reshape(1) if priors is None else delta + priors,
                alone=priors is not None,
            )
            for name, block, delta in zip(
                self.names, precision.blocks, precision.deltas, strict=True
            )
        }

    def _joint(self, ask: Ask, precision: EigenKron) -> OutputMoments:
        """Covariance across samples; where they fill several chunks, every pair is visited.

        Rows are recomputed for each pair: what is held at a time are the rows of two chunks.
        """
        tables = dict(zip(self.names, precision.tables(), strict=True))
        bases = dict(zip(self.names, precision.blocks, strict=True))

        def walk() -> Iterator[tuple[Chunk, list[JointRows]]]:
            for chunk in self.engine.chunks(
                ask.inputs, identity_columns, differentiable=ask.differentiable
            ):
                with outside_inference_mode(), torch.set_grad_enabled(ask.differentiable):
                    rows = []
                    for name, found in chunk.blocks:
                        jacobian = found.rotated(bases[name]).expanded()
                        rows.append(JointRows.of(jacobian, tables[name]))
                yield chunk, rows

        whole = slice(0, batch_length(ask.inputs))
        outputs, bands = [], []
        for chunk, left in walk():
            others = (left,) if chunk.rows == whole else (right for _, right in walk())
            with outside_inference_mode(), torch.set_grad_enabled(ask.differentiable):
                outputs.append(chunk.outputs)
                zero = chunk.outputs.new_zeros(())
                band = [
                    sum((x.product(y) for x, y in zip(left, right, strict=True)), zero)
                    for right in others
                ]
                bands.append(torch.cat(band, dim=1))
        return OutputMoments(torch.cat(outputs), torch.cat(bands).unsqueeze(0))


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
        entries = jacobian.entries(table).rsqrt()  # [K], or [m, K]
        whitened = jacobian.values * (entries if entries.ndim == 1 else entries.unsqueeze(1))
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
