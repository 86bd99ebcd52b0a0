r"""Curvature along given directions, by rows or by forward-mode derivatives.

With S_n the columns of sample n, its share of the curvature along u_k is ‖S_nᵀ J_n u_k‖². The
projections p = S_nᵀ J_n U [R, k] come from rows, p = (J_nᵀ S_n)ᵀ U at R backward passes whatever k,
or from forward mode, J_n u_k at one pass per direction whatever R. Floating-point operations are
counted, and the cheaper way is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from laplace_debiased.curvature.lowrank.rows import RowPass
from laplace_debiased.network.inputs import batch_length, select_rows
from laplace_debiased.network.modes import differentiable_kernels
from laplace_debiased.network.transforms import Parameters, directional_outputs


class Route(Enum):
    """How derivatives along directions are taken."""

    ROWS = "rows"
    FORWARD = "forward"


@dataclass(frozen=True)
class Costs:
    """Floating-point operations for the projections of one sample on all directions."""

    rows: float
    forward: float

    @property
    def cheaper(self) -> Route:
        """The route with fewer operations."""
        return Route.ROWS if self.rows <= self.forward else Route.FORWARD


def projection_costs(n_forward: float, n_params: int, n_columns: int, n_directions: int) -> Costs:
    """Count both routes from the operations of one forward pass.

    Rows: a forward pass, one backward pass (twice a forward pass) per column, and a matrix product
    of R rows with U. Forward mode: about two further forward passes per direction, for the
    derivative with respect to inputs and to weights of each layer.
    """
    rows = n_forward * (1 + 2 * n_columns) + 2.0 * n_columns * n_params * n_directions
    return Costs(rows, n_forward * (1 + 2 * n_directions))


@dataclass(frozen=True, eq=False)
class DirectionPass:
    """Projections of samples' columns on a fixed set of directions.

    Args:
        row_pass: the network, and how rows are computed.
        basis: U [P, k].
        route: rows or forward mode; None for the cheaper one.
    """

    row_pass: RowPass
    basis: Tensor
    route: Route | None = None
    _forward_flops: dict[str, float] = field(default_factory=dict, repr=False)

    def projections(self, inputs: Any, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """S_nᵀ J_n U for a batch, in pieces.

        Args:
            inputs: model inputs of m samples.
            columns: S [m, C, R].

        Yields:
            Samples, and projections [n, r, k] of some or all of their columns; every sample and
            column is in exactly one piece.
        """
        if (self.route or self._cheaper(inputs, columns.shape[-1])) is Route.ROWS:
            for tile, rows in self.row_pass.walk(inputs, columns):
                yield tile.samples, rows @ self.basis
            return
        step = self._chunk_samples(inputs)
        for start in range(0, len(columns), step):
            samples = slice(start, start + step)
            along = self.jacobian_products(select_rows(inputs, samples))
            yield samples, torch.einsum("ncr,nck->nrk", columns[samples], along)

    def jacobian_products(self, inputs: Any) -> Tensor:
        """J_n U [n, C, k] by forward mode, vectorised over some directions at a time."""
        network = self.row_pass.network
        inputs = network.prepare(inputs)
        parameters, constants = network.parameters(), network.constants()

        def call(values: Parameters) -> Tensor:
            return network.call(values, constants, inputs)

        width = self._chunk_directions(inputs)
        with differentiable_kernels(network.model), torch.no_grad():
            pieces = [
                directional_outputs(call, parameters, network.split(part))
                for part in self.basis.split(width, dim=1)
            ]
        return torch.cat(pieces).permute(1, 2, 0)

    def _cheaper(self, inputs: Any, n_columns: int) -> Route:
        if "one sample" not in self._forward_flops:
            with FlopCounterMode(display=False) as counter:
                self.row_pass.outputs(select_rows(inputs, slice(0, 1)))
            self._forward_flops["one sample"] = float(counter.get_total_flops())
        n_params, n_directions = self.basis.shape
        forward = self._forward_flops["one sample"]
        return projection_costs(forward, n_params, n_columns, n_directions).cheaper

    def _activation_bytes(self, inputs: Any) -> int:
        """What one sample's derivative along one direction holds, roughly: its activations."""
        return max(1, self.row_pass.saved_bytes(inputs))

    def _chunk_samples(self, inputs: Any) -> int:
        fits = self.row_pass.byte_budget // self._activation_bytes(inputs)
        return max(1, min(batch_length(inputs), fits))

    def _chunk_directions(self, inputs: Any) -> int:
        per_direction = batch_length(inputs) * self._activation_bytes(inputs)
        per_direction += self.basis.shape[0] * self.basis.element_size()
        return max(1, self.row_pass.byte_budget // per_direction)
