r"""Covariances of a chunk's outputs from rows in eigenbases, tile by tile of columns.

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from laplace_debiased.curvature.passes import Blocks, Chunk
from laplace_debiased.curvature.rows import Basis, PositionRows, RankOneRows, RotatedRows, Weights
from laplace_debiased.predictive.selection import SelectedChunk

Rotated: TypeAlias = RotatedRows | RankOneRows | PositionRows


@dataclass(frozen=True, eq=False)
class Products:
    """Covariances under W weights of every direction.

    Attributes:
        basis: eigenbasis of a block, by parameter name.
        weights: of its directions.
        n_weights: W.
        diagonal: variances only.
    """

    basis: Callable[[str], Basis]
    weights: Callable[[str], Weights]
    n_weights: int
    diagonal: bool

    def of(self, part: SelectedChunk) -> Tensor:
        """[W, m, K, K] or, of variances, [W, m, K]; [W, m, L, ...] at L positions."""
        *lead, n_outputs = part.shape
        if part.chunk.step < part.chunk.n_columns == n_outputs:
            found = self._tiled(part.chunk, part.outputs)
        else:
            found = self._whole(part.chunk.blocks, part.outputs, math.prod(lead), n_outputs)
        return found.reshape(self.n_weights, *lead, *found.shape[2:])

    def _rotated(self, blocks: Blocks) -> Iterator[tuple[str, Rotated]]:
        for name, rows in blocks:
            yield name, rows.rotated(self.basis(name))

    def _between(self, name: str, left: Any, right: Any) -> Tensor:
        # Rows of one parameter are of the same class, whichever the columns.
        return left.products(right, self.weights(name), diagonal=self.diagonal)

    def _whole(self, blocks: Blocks, like: Tensor, m: int, n_outputs: int) -> Tensor:
        """All columns at a time, of one parameter after the other."""
        sides = [n_outputs] if self.diagonal else [n_outputs, n_outputs]
        total = like.new_zeros(self.n_weights, m, *sides)
        for name, jacobian in self._rotated(blocks):
            rows = jacobian.per_position(n_outputs)
            total = total + self._between(name, rows, rows)
        return total

    def _tiled(self, chunk: Chunk, like: Tensor) -> Tensor:
        if self.diagonal:
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
