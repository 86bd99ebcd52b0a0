r"""Covariance of the linearised network's outputs under a low-rank posterior.

With the precision P = h U diag(Nλ) Uᵀ + D, whiten by the prior: J̄ = J D^-½. In the whitened space
the curvature has orthonormal eigenvectors q_k and eigenvalues s_k, and

    Cov[f] = J̄ Q diag(1/(1+s)) Qᵀ J̄ᵀ + (J̄ − J̄QQᵀ)(J̄ − J̄QQᵀ)ᵀ.

The second term is what curvature says nothing about. It is formed explicitly and not as a
difference of two variances: where curvature pins an output down a million times better than the
prior, that difference is rounding error in float32, while this sum is exact and never negative.
The rows of J are needed for it in any case, at C backward passes, so that J U is one matrix
product: forward mode, at one pass per direction, could only add to this.

With a scalar prior precision neither J Q nor the complement depends on it, and one pass serves a
whole grid of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.curvature.lowrank.rows import RowPass, Tile
from laplace_debiased.curvature.lowrank.span import Eigenpairs
from laplace_debiased.curvature.passes import UnitColumns, identity_columns
from laplace_debiased.errors import NumericalError
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.predictive.predictor import Ask, OutputMoments, Predictor, beside


@dataclass(frozen=True, eq=False)
class WhitenedFrame:
    """Eigenvectors of the likelihood's precision in the prior's coordinates.

    Attributes:
        basis: U [P, k], orthonormal.
        curvature: s [k], eigenvalues of D^-½ (h U diag(Nλ) Uᵀ) D^-½: summed over data.
        prior: δ, what a scalar prior adds to s; 1 where the frame is whitened by D itself.
        inverse_root: D^-½ [P]; None for a scalar prior (the coordinates are then the plain ones).
        rotation: from J D⁻¹ U to coordinates along the q_k [k, k]; None for the identity.
        normal: (Uᵀ D⁻¹ U)⁻¹ [k, k]; None for the identity.
    """

    basis: Tensor
    curvature: Tensor
    prior: Tensor
    inverse_root: Tensor | None = None
    rotation: Tensor | None = None
    normal: Tensor | None = None

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates inside the span [n, r, k], and the remainder [n, r, P], of rows J."""
        if self.inverse_root is None:
            inside = rows @ self.basis
            return inside, rows - inside @ self.basis.T
        assert self.rotation is not None
        assert self.normal is not None
        whitened = rows * self.inverse_root
        products = (whitened * self.inverse_root) @ self.basis
        back = (products @ self.normal) @ self.basis.T
        return products @ self.rotation, whitened - back * self.inverse_root


@dataclass(frozen=True, eq=False)
class LowRankPredictor(Predictor):
    """A low-rank curvature with the network that it belongs to.

    Attributes:
        engine: computes rows of the network's Jacobian.
        pairs: eigenpairs of the per-sample mean curvature.
        n_data: N.
        layer_sizes: entries of every covered parameter, for a prior per layer.
    """

    engine: RowPass
    pairs: Eigenpairs
    n_data: int
    layer_sizes: tuple[int, ...]

    def precision(self, h: Tensor, prior: Tensor) -> WhitenedFrame:
        """In the prior's coordinates; δ is [1], one per covered parameter tensor, or [P].

        Raises:
            NumericalError: if the directions are dependent in these coordinates.
        """
        basis = self.pairs.basis
        scale, prior = (h.reshape(()) * self.n_data).to(basis), prior.to(basis)
        if prior.numel() == 1:
            curvature = self.pairs.eigenvalues.to(scale) * scale
            return WhitenedFrame(basis, curvature, prior.reshape(()))
        if len(prior) == len(self.layer_sizes) != len(basis):
            prior = prior.repeat_interleave(torch.tensor(self.layer_sizes, device=prior.device))
        inverse_root = prior.rsqrt()
        whitened = basis * inverse_root.unsqueeze(-1)
        lower, info = torch.linalg.cholesky_ex((whitened.T @ whitened).double())
        if int(info) != 0:
            raise NumericalError(
                "the curvature's directions are dependent after division by the prior precision, "
                f"whose entries reach from {float(prior.min()):.3g} to {float(prior.max()):.3g}; "
                "bring them closer together."
            )
        curvature = self.pairs.eigenvalues.to(lower) * scale.to(lower)
        values, vectors = torch.linalg.eigh(lower.T @ (curvature.unsqueeze(-1) * lower))
        rotation = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
        return WhitenedFrame(
            basis,
            values.clamp_min(0.0).to(basis),
            basis.new_ones(()),
            inverse_root,
            rotation.to(basis),
            torch.cholesky_inverse(lower).to(basis),
        )

    def under(
        self, ask: Ask, precision: WhitenedFrame, priors: Tensor | None = None
    ) -> OutputMoments:
        """See :class:`Predictor`."""
        ask.selection.require_no_positions()
        outputs = self.engine.outputs(ask.inputs, differentiable=ask.differentiable)
        chosen = ask.chosen(outputs)
        if chosen is None:
            columns = identity_columns(outputs, slice(None))
        else:
            columns = UnitColumns(outputs.detach(), chosen).dense()
        with outside_inference_mode(), torch.set_grad_enabled(ask.differentiable):
            inside, outside = self._parts(ask, precision, columns)
            if ask.joint:
                inside, outside = inside.flatten(0, 1), outside.flatten(2).flatten(0, 1)

            def covariance(scale: Tensor, prior: Tensor | float) -> Tensor:
                within = inside.square() @ scale if ask.diagonal else (inside * scale) @ inside.mT
                return (within + outside / prior).unsqueeze(0)

            added = precision.prior.reshape(1) if priors is None else precision.prior + priors
            found = [
                covariance((precision.curvature + prior).reciprocal(), prior)
                for prior in added.to(outside)
            ]
            if priors is not None:
                found.append(covariance(torch.ones_like(precision.curvature), 1.0))
            return OutputMoments(outputs, beside(found, 0), chosen)

    def _parts(self, ask: Ask, frame: WhitenedFrame, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates [m, C, k], and products of the remainders [m, C, C].

        These are [m, C, m, C] of a joint covariance, and squared norms [m, C] for variances. Rows
        are recomputed for each pair of tiles that meet: those of one sample if it has several, all
        of them for the joint covariance. What is held at a time are the rows of two tiles.
        """
        m, _, n_outputs = columns.shape
        inside = columns.new_zeros(m, n_outputs, len(frame.curvature))
        shape = (m, n_outputs) if ask.diagonal else (m, n_outputs, n_outputs)
        outside = columns.new_zeros((m, n_outputs, m, n_outputs) if ask.joint else shape)

        def split(tile: Tile) -> tuple[Tensor, Tensor]:
            rows = self.engine.tile_rows(
                ask.inputs, columns, tile, differentiable=ask.differentiable
            )
            return frame.split(rows)

        tiles = self.engine.tiles(ask.inputs, n_outputs) if m else ()
        for index, tile in enumerate(tiles):
            along, rest = split(tile)
            inside[tile.samples, tile.columns] = along
            if ask.diagonal:
                outside[tile.samples, tile.columns] = rest.square().sum(-1)
                continue
            for other in tiles[index:]:
                if not (ask.joint or other.samples == tile.samples):
                    continue
                right = rest if other is tile else split(other)[1]
                if ask.joint:
                    block = torch.einsum("ncp,mdp->ncmd", rest, right)
                    outside[tile.samples, tile.columns, other.samples, other.columns] = block
                    mirrored = block.permute(2, 3, 0, 1)
                    outside[other.samples, other.columns, tile.samples, tile.columns] = mirrored
                else:
                    block = rest @ right.mT
                    outside[tile.samples, tile.columns, other.columns] = block
                    outside[tile.samples, other.columns, tile.columns] = block.mT
        return inside, outside
