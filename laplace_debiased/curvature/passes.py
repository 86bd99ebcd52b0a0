"""Passes over a batch, layer by layer, in chunks that fit a byte budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.layers import Layer
from laplace_debiased.curvature.rows import LayerRows
from laplace_debiased.curvature.tape import Calls, LayerTape, record
from laplace_debiased.network.inputs import batch_length, select_rows, tensor_shapes, to_device
from laplace_debiased.network.modes import math_attention
from laplace_debiased.network.outputs import check_outputs
from laplace_debiased.network.precision import full_precision
from laplace_debiased.options import DEFAULT_BYTE_BUDGET


@dataclass(frozen=True, eq=False)
class UnitColumns:
    """Columns that pick one output each, another one for every sample; written out one at a time.

    It stands for the tensor [m, C, R] (or [m, T, C, R]) that is one at ``indices`` and zero
    elsewhere, which at large C would be larger than all that a pass holds.

    Attributes:
        like: outputs [m, C] or [m, T, C]: shape, dtype and device of a column.
        indices: which of a sample's outputs, counted through its positions [m, R].
    """

    like: Tensor
    indices: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return torch.Size((*self.like.shape, self.indices.shape[-1]))

    def to(self, dtype: torch.dtype) -> UnitColumns:
        """The same of another dtype."""
        return replace(self, like=self.like.to(dtype))

    def column(self, r: int) -> Tensor:
        """The r-th column [m, C] or [m, T, C]."""
        flat = torch.zeros_like(self.like).flatten(1)
        return flat.scatter_(1, self.indices[:, r : r + 1], 1.0).reshape(self.like.shape)

    def dense(self) -> Tensor:
        """The tensor itself [..., R]."""
        return torch.stack([self.column(r) for r in range(self.shape[-1])], dim=-1)


Columns = Callable[[Tensor, slice], "Tensor | UnitColumns"]
"""From outputs [m, C] of the given rows of a batch to the columns [m, C, R] to pull back."""


_STREAMING = 2
"""A pass that streams its columns takes this part of the byte budget: on a ResNet-20 chunks of
twice the size save 4 % of its time and cost 60 % more memory."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk of a batch after one forward pass and R pull-backs.

    Attributes:
        rows: which samples of the batch.
        outputs: network outputs [m, C].
        layer_rows: computes one layer's rows on demand, so that only one layer's patches are held.
        layers: the layers that affect the outputs.
    """

    rows: slice
    outputs: Tensor
    layers: tuple[Layer, ...]
    layer_rows: Callable[[Layer], LayerRows]


@dataclass(frozen=True, eq=False)
class ColumnChunk:
    """A chunk of a batch whose columns are pulled back one at a time.

    What sums over columns needs no array of all of them: the memory is that of the graph and of
    one gradient per recorded output.

    Attributes:
        rows: which samples of the batch.
        outputs: network outputs [m, C].
        inputs: by layer name, the recorded layer inputs.
        columns: walks the R columns, once: by layer name, gradients in the layer's output, of the
            model's dtype. Layers that do not affect the outputs are missing.
    """

    rows: slice
    outputs: Tensor
    inputs: Mapping[str, Calls]
    columns: Iterator[Mapping[str, Calls]]


class CurvaturePass(Protocol):
    """Walks a batch: forward, pull back columns, and hand over every layer's rows."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The covered layers."""

    def chunks(
        self,
        inputs: Any,
        columns: Columns,
        *,
        n_columns: int | None = None,
        differentiable: bool = False,
    ) -> Iterator[Chunk]:
        """Chunks of the batch in order; each sample is in exactly one."""

    def column_chunks(
        self, inputs: Any, columns: Columns, *, n_columns: int | None = None
    ) -> Iterator[ColumnChunk]:
        """The same, column by column. A chunk is to be used up before the next one is asked for."""

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs [m, C] without a graph."""

    def output_shape(self, inputs: Any) -> torch.Size:
        """Shape of one sample's outputs: [C], or [T, C]."""

    def columns_that_fit(self, inputs: Any) -> int:
        """How many columns of one sample fit the byte budget; at least one."""


def written_out(columns: Tensor | UnitColumns) -> Tensor:
    """Columns as a tensor [m, C, R]."""
    return columns.dense() if isinstance(columns, UnitColumns) else columns


def identity_columns(outputs: Tensor, rows: slice) -> Tensor:
    """One column per output: the pull-backs are the rows of the Jacobian."""
    m, *shape = outputs.shape
    n_outputs = math.prod(shape)
    eye = torch.eye(n_outputs, dtype=outputs.dtype, device=outputs.device)
    return eye.reshape(*shape, n_outputs).expand(m, *shape, n_outputs)


@dataclass(frozen=True, eq=False)
class BackwardPass:
    """The general pass: one forward pass per chunk, one backward pass per column.

    Memory of a chunk is that of its graph, of R gradients at every recorded output and of one
    layer's patches and Jacobian; the chunk length follows from ``byte_budget``. No result depends
    on it.

    Args:
        model: the network; left untouched.
        layers: its covered layers.
        byte_budget: working memory of one chunk, in bytes.
    """

    model: nn.Module
    layers: tuple[Layer, ...]
    byte_budget: int = DEFAULT_BYTE_BUDGET
    _footprints: dict[tuple, Footprint] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs [m, C] without a graph."""
        tape = record(self.model, (), to_device(inputs, self.device))
        return full_precision(tape.outputs.detach())

    def output_shape(self, inputs: Any) -> torch.Size:
        """Shape of one sample's outputs: [C], or [T, C]; a forward pass the first time."""
        return self._footprint(to_device(inputs, self.device)).outputs

    def columns_that_fit(self, inputs: Any) -> int:
        """How many columns of one sample fit the byte budget; at least one."""
        footprint = self._footprint(to_device(inputs, self.device))
        return footprint.columns_in(self.byte_budget)

    def chunks(
        self,
        inputs: Any,
        columns: Columns,
        *,
        n_columns: int | None = None,
        differentiable: bool = False,
    ) -> Iterator[Chunk]:
        """Forward and pull back, chunk by chunk.

        Args:
            inputs: one batch of model inputs.
            columns: what to pull back.
            n_columns: R where the caller knows it; else the number of outputs is assumed.
            differentiable: keep the graph, for gradients with respect to ``inputs``.

        Raises:
            ValueError: if ``inputs`` hold no sample.
        """
        inputs = to_device(inputs, self.device)
        for rows, part in self._parts(inputs, n_columns, self.byte_budget):
            yield self._chunk(part, rows, columns, differentiable)

    def column_chunks(
        self, inputs: Any, columns: Columns, *, n_columns: int | None = None
    ) -> Iterator[ColumnChunk]:
        """Forward, then one pull-back at a time, chunk by chunk; arguments as in ``chunks``."""
        inputs = to_device(inputs, self.device)
        for rows, part in self._parts(inputs, 1, self.byte_budget // _STREAMING):
            tape = record(self.model, self.layers, part)
            check_outputs(tape.outputs, rows.stop - rows.start, positions=True)
            outputs = full_precision(tape.outputs.detach())
            recorded = {
                layer.name: map_calls(_detached, tape.inputs_of(layer.name))
                for layer in self.layers
                if layer.name in tape.calls
            }
            to_pull = columns(outputs, rows).to(tape.outputs.dtype)
            yield ColumnChunk(rows, outputs, recorded, _pull_back_each(tape, to_pull))

    def _parts(
        self, inputs: Any, n_columns: int | None, byte_budget: int
    ) -> Iterator[tuple[slice, Any]]:
        length = batch_length(inputs)
        if length == 0:
            raise ValueError("the model inputs hold no sample.")
        step = self._chunk_length(inputs, length, n_columns, byte_budget)
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            yield rows, inputs if rows == slice(0, length) else select_rows(inputs, rows)

    def _chunk(self, inputs: Any, rows: slice, columns: Columns, differentiable: bool) -> Chunk:
        # The fused attention kernels cannot be differentiated twice.
        with math_attention() if differentiable else nullcontext():
            tape = record(self.model, self.layers, inputs)
        check_outputs(tape.outputs, rows.stop - rows.start, positions=True)
        outputs = full_precision(tape.outputs if differentiable else tape.outputs.detach())
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            to_pull = columns(outputs, rows).to(tape.outputs.dtype)
            stacks = _pull_back_all(tape, to_pull, differentiable)
        present = tuple(layer for layer in self.layers if stacks.get(layer.name))

        def layer_rows(layer: Layer) -> LayerRows:
            inputs = tape.inputs_of(layer.name)
            inputs = map_calls(full_precision if differentiable else _detached, inputs)
            return layer.rows_of_calls(inputs, _stacked(stacks.pop(layer.name)))

        return Chunk(rows, outputs, present, layer_rows)

    def _chunk_length(
        self, inputs: Any, length: int, n_columns: int | None, byte_budget: int
    ) -> int:
        if length <= 1:
            return max(length, 1)
        return max(1, min(length, byte_budget // self._footprint(inputs).bytes(n_columns)))

    def _footprint(self, inputs: Any) -> Footprint:
        """What one sample takes; measured once for inputs of a shape."""
        key = tensor_shapes(inputs)
        if key not in self._footprints:
            if batch_length(inputs) == 0:
                raise ValueError("the model inputs hold no sample.")
            tape = record(self.model, self.layers, select_rows(inputs, slice(0, 1)))
            check_outputs(tape.outputs, 1, positions=True)
            self._footprints[key] = Footprint.of(tape, self.layers)
        return self._footprints[key]


def _pull_back_all(
    tape: LayerTape, columns: Tensor | UnitColumns, differentiable: bool
) -> dict[str, list[Calls]]:
    stacks: dict[str, list[Calls]] = {}
    for pulled in _pull_back_each(tape, columns, differentiable):
        for name, calls in pulled.items():
            stacks.setdefault(name, []).append(calls)
    return stacks


def _pull_back_each(
    tape: LayerTape, columns: Tensor | UnitColumns, differentiable: bool = False
) -> Iterator[dict[str, Calls]]:
    """One pull-back per column of ``columns`` [m, C, R]; nothing where no layer was recorded."""
    n_columns = columns.shape[-1] if tape.calls else 0
    for r in range(n_columns):
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            column = columns.column(r) if isinstance(columns, UnitColumns) else columns[..., r]
            pulled = tape.pull_back(
                column, create_graph=differentiable, retain_graph=r + 1 < n_columns
            )
        yield pulled


def map_calls(function: Callable[[Tensor], Tensor], calls: Calls) -> Calls:
    """A function of every tensor of a layer's calls."""
    return tuple(tuple(function(tensor) for tensor in call) for call in calls)


def _detached(tensor: Tensor) -> Tensor:
    return full_precision(tensor.detach())


def _stacked(columns: list[Calls]) -> Calls:
    """R columns of a layer's calls as one [m, R, ...] per tensor."""
    return tuple(
        tuple(full_precision(torch.stack(parts, dim=1)) for parts in zip(*call, strict=True))
        for call in zip(*columns, strict=True)
    )


@dataclass(frozen=True)
class Footprint:
    """Working memory of one sample in a pass, from a tape of one sample.

    The graph holds about two tensors per recorded output (before and after its non-linearity);
    the columns one per output and column; one layer at a time holds its patches twice and two
    arrays of the size of its rotated gradients.

    Attributes:
        outputs: shape of the network's outputs, [C] or [T, C].
        element: bytes of a number.
        inputs: entries of all recorded inputs.
        written: entries of all recorded outputs.
        layers: per layer, entries of its patches and of one column's rows.
    """

    outputs: torch.Size
    element: int
    inputs: int
    written: int
    layers: tuple[tuple[int, int], ...]

    @staticmethod
    def of(tape: LayerTape, layers: tuple[Layer, ...]) -> Footprint:
        """From a tape of one sample."""
        read = written = 0
        sizes = []
        for layer in layers:
            patches = working = 0
            for call in tape.calls.get(layer.name, ()):
                n_outputs = sum(shape.numel() for shape in call.shapes)
                read += sum(tensor.numel() for tensor in call.inputs)
                written += n_outputs
                zeros = (tape.outputs.new_zeros(shape).unsqueeze(1) for shape in call.shapes)
                rows = layer.rows(tuple(map(_detached, call.inputs)), tuple(map(_detached, zeros)))
                entries = sum(block.entries for _, block in rows.blocks())
                patches += sum(block.patches for _, block in rows.blocks())
                working = max(working, entries) + n_outputs
            sizes.append((patches, working))
        return Footprint(
            tape.outputs.shape[1:], tape.outputs.element_size(), read, written, tuple(sizes)
        )

    def bytes(self, n_columns: int | None) -> int:
        """Of so many columns; None for one per output."""
        columns = self.outputs.numel() if n_columns is None else n_columns
        graph = self.inputs + (2 + columns) * self.written
        largest = max(
            (2 * patches + 2 * columns * rows for patches, rows in self.layers), default=0
        )
        return max(1, self.element * (graph + largest))

    def columns_in(self, byte_budget: int) -> int:
        """How many columns fit; at least one."""
        fixed = self.bytes(0)
        each = self.element * (self.written + 2 * max((rows for _, rows in self.layers), default=0))
        return max(1, (byte_budget - fixed) // max(1, each))
