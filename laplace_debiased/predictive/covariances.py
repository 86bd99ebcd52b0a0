r"""Covariances of outputs from rows in eigenbases, chunk by chunk and tile by tile of columns.

Cov[f_c, f_c'] = Σ_ij w_ij J̃_c,ij J̃_c',ij is a sum over blocks of products of two columns' rows. All
columns of a chunk are pulled back at a time where they fit the pass's memory. Where those of one
sample do not, they are pulled back tile by tile. Rows in an eigenbasis take far less than what was
pulled back (a column holds gradients at every activation; a convolution's row has as many entries
as its weight, or as its output where that is smaller), so the rows of a *panel* of tiles are kept,
as many as fit the other half of the memory, and multiplied with each other; columns beyond the
panel are pulled back once more, to be multiplied with it. With one panel, which is nearly always,
every column is pulled back once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from laplace_debiased.curvature import BackwardPass, Chunk
from laplace_debiased.curvature.passes import Blocks, UnitColumns
from laplace_debiased.curvature.rows.rotated import PositionRows, RankOneRows, RotatedRows, Weights
from laplace_debiased.curvature.rows.size import Basis
from laplace_debiased.network.forecast import Forecast
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import batch_length
from laplace_debiased.predictive.predictor import Ask, OutputMoments, beside
from laplace_debiased.predictive.selection import MOST_PROBABLE, at_positions, last_positions

Rotated: TypeAlias = RotatedRows | RankOneRows | PositionRows

_FEW = 32
"""Pull-backs, samples times columns, that nobody waits a minute for."""


@dataclass(frozen=True, eq=False)
class Products:
    """Covariances under W weights of every direction.

    Attributes:
        bases: eigenbases of the blocks, by parameter name.
        weights: of their directions.
        n_weights: W.
        ask: which covariances.
    """

    bases: Mapping[str, Basis]
    weights: Mapping[str, Weights]
    n_weights: int
    ask: Ask

    def moments(self, engine: BackwardPass) -> OutputMoments:
        """Of a batch, the covariances [W, ...].

        Every position has columns of its own; a sequence whose columns do not fit the pass's budget
        at a time is gone through in groups of positions, each with a forward pass of its own.
        """
        *positions, n_outputs = engine.output_shape(self.ask.inputs)
        selection = self.ask.selection
        width = min(selection.n_outputs or n_outputs, n_outputs)
        groups: list[slice | Tensor | None] = [None]
        if selection.last_position:
            if not positions:
                selection.require_no_positions()
            groups = [last_positions(self.ask.inputs, positions[0])]
        elif positions:
            step = max(1, engine.columns_that_fit(self.ask.inputs, self.bases) // width)
            starts = range(0, positions[0], step)
            groups = [slice(start, min(start + step, positions[0])) for start in starts]
        each = width * (1 if selection.last_position else math.prod(positions))
        forecast = _forecast(engine, batch_length(self.ask.inputs), each, n_outputs)
        found = [
            _put_together(self._of_group(engine, group, width, forecast), (0, 1, 0))
            for group in groups
        ]
        with torch.set_grad_enabled(self.ask.differentiable):
            return OutputMoments(*_put_together(found, (1, 2, 1)))

    def _of_group(
        self,
        engine: BackwardPass,
        group: slice | Tensor | None,
        width: int,
        forecast: Forecast | None,
    ) -> list[tuple[Any, ...]]:
        """Outputs, covariances and chosen outputs of every chunk at some positions."""
        ask = self.ask

        def columns(outputs: Tensor, rows: slice) -> UnitColumns:
            reduced = at_positions(outputs, group, rows)
            chosen, n_outputs = ask.chosen(reduced), outputs.shape[-1]
            if chosen is None:
                chosen = torch.arange(n_outputs, device=outputs.device).expand(reduced.shape)
            if isinstance(group, slice):
                at = torch.arange(group.start, group.stop, device=outputs.device)
                chosen = chosen + n_outputs * at.unsqueeze(-1)
            elif group is not None:
                chosen = chosen + n_outputs * group[rows].to(outputs.device).unsqueeze(-1)
            return UnitColumns(outputs.detach(), chosen.flatten(1), forecast)

        found: list[tuple[Any, ...]] = []
        for chunk in engine.chunks(
            ask.inputs,
            columns,
            n_columns=width * (group.stop - group.start if isinstance(group, slice) else 1),
            bases=self.bases,
            differentiable=ask.differentiable,
        ):
            with outside_inference_mode(), torch.set_grad_enabled(ask.differentiable):
                outputs = at_positions(chunk.outputs, group, chunk.rows)
                found.append((outputs, self._of(chunk, outputs), ask.chosen(outputs)))
        return found

    def _of(self, chunk: Chunk, outputs: Tensor) -> Tensor:
        """[W, m, K, K] or, of variances, [W, m, K]; [W, m, L, ...] at L positions."""
        chosen = self.ask.chosen(outputs)
        *lead, n_outputs = (outputs if chosen is None else chosen).shape
        if chunk.step < chunk.n_columns == n_outputs:
            found = self._tiled(chunk, outputs)
        else:
            found = self._whole(chunk.blocks, outputs, math.prod(lead), n_outputs)
        return found.reshape(self.n_weights, *lead, *found.shape[2:])

    def _rotated(self, blocks: Blocks) -> Iterator[tuple[str, Rotated]]:
        for name, rows in blocks:
            yield name, rows.rotated(self.bases[name])

    def _between(self, name: str, left: Any, right: Any) -> Tensor:
        # Rows of one parameter are of the same class, whichever the columns.
        return left.products(right, self.weights[name], diagonal=self.ask.diagonal)

    def _whole(self, blocks: Blocks, like: Tensor, m: int, n_outputs: int) -> Tensor:
        """All columns at a time, of one parameter after the other."""
        sides = [n_outputs] if self.ask.diagonal else [n_outputs, n_outputs]
        total = like.new_zeros(self.n_weights, m, *sides)
        for name, jacobian in self._rotated(blocks):
            rows = jacobian.per_position(n_outputs)
            total = total + self._between(name, rows, rows)
        return total

    def _tiled(self, chunk: Chunk, like: Tensor) -> Tensor:
        if self.ask.diagonal:
            found = [self._whole(tile, like, 1, s.stop - s.start) for s, tile in chunk.tiles()]
            return torch.cat(found, dim=-1)
        n_columns = chunk.n_columns
        total = like.new_zeros(self.n_weights, 1, n_columns, n_columns)
        start = 0
        while start < n_columns:
            panel = self._panel(chunk, start)
            inside, stop = slice(start, panel.stop), panel.stop
            rows = panel.joined()
            for name, own in rows.items():
                total[..., inside, inside] += self._between(name, own, own)
            for first in range(stop, n_columns, chunk.step):
                tile = slice(first, min(first + chunk.step, n_columns))
                for name, other in self._rotated(chunk.pull(tile, False)):
                    total[..., inside, tile] += self._between(name, rows[name], other)
                total[..., tile, inside] = total[..., inside, tile].mT
            start = stop
        return total

    def _panel(self, chunk: Chunk, start: int) -> _Panel:
        """Rows of as many columns as half of the memory holds, at least of one tile."""
        panel, most = _Panel(start), chunk.byte_budget // 2
        while panel.stop < chunk.n_columns:
            width = min(chunk.step, chunk.n_columns - panel.stop)
            if panel.nbytes and panel.nbytes * (1 + width / (panel.stop - start)) > most:
                break
            tile = slice(panel.stop, panel.stop + width)
            last = start == 0 and tile.stop == chunk.n_columns
            panel.add(tile, self._rotated(chunk.pull(tile, last)))
        return panel


@dataclass(eq=False)
class _Panel:
    """Rows of consecutive columns in eigenbases, by parameter name.

    Attributes:
        stop: the column after the last.
        nbytes: what they take.
    """

    stop: int
    nbytes: int = 0
    _rows: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, tile: slice, blocks: Iterator[tuple[str, Rotated]]) -> None:
        """The columns that follow."""
        for name, rows in blocks:
            parts = self._rows.setdefault(name, [])
            parts.append(rows.sharing(parts[0]) if parts else rows)
            self.nbytes += rows.nbytes
        self.stop = tile.stop

    def joined(self) -> dict[str, Any]:
        """The rows of all columns; the parts are used up."""
        found = {}
        for name in list(self._rows):
            first, *others = self._rows.pop(name)
            found[name] = first.beside(others) if others else first
        return found


def _put_together(parts: list[tuple[Any, ...]], dims: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(
        beside(values, dim) for values, dim in zip(zip(*parts, strict=True), dims, strict=True)
    )


def _forecast(
    engine: BackwardPass, n_samples: int, n_columns: int, n_outputs: int
) -> Forecast | None:
    """Foretells the pull-backs of a batch; None where they are few."""
    if n_samples * n_columns < _FEW:
        return None
    if n_columns >= n_outputs > MOST_PROBABLE:
        advice = (
            f"n_outputs={MOST_PROBABLE} (an option of the posterior) takes the most probable "
            f"outputs of each sample in place of {n_outputs} backward passes"
        )
    else:
        advice = (
            "A smaller n_outputs (an option of the posterior) takes fewer backward passes; "
            "subset_of_weights='last_layer' takes none"
        )
    return Forecast(f"moments of {n_samples} samples", n_samples * n_columns, f"{advice}.", engine)
