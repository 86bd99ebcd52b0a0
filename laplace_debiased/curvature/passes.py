"""Passes over a batch in chunks that fit a byte budget: forward, and columns pulled back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from laplace_debiased.curvature.footprint import Footprint
from laplace_debiased.curvature.general import GeneralRows, general_rows
from laplace_debiased.curvature.operations.call import Cotangents, OperationCall, blocks_of
from laplace_debiased.curvature.recorder import record
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.size import Basis
from laplace_debiased.curvature.tape import Tape
from laplace_debiased.network.forecast import Forecast
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import (
    batch_length,
    pieces,
    row_slices,
    select_rows,
    tensor_shapes,
    to_device,
)
from laplace_debiased.network.memory import memory_of_one
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
        forecast: hears of every column that is asked for, in samples; None for nobody.
    """

    like: Tensor
    indices: Tensor
    forecast: Forecast | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return torch.Size((*self.like.shape, self.indices.shape[-1]))

    def to(self, dtype: torch.dtype) -> UnitColumns:
        """The same of another dtype."""
        return replace(self, like=self.like.to(dtype))

    def column(self, r: int) -> Tensor:
        """The r-th column [m, C] or [m, T, C]."""
        if self.forecast is not None:
            # What was asked for before has been pulled back by now.
            self.forecast.done(len(self.indices) if r else 0)
        flat = torch.zeros_like(self.like).flatten(1)
        return flat.scatter_(1, self.indices[:, r : r + 1], 1.0).reshape(self.like.shape)

    def dense(self) -> Tensor:
        """The tensor itself [..., R]."""
        return torch.stack([self.column(r) for r in range(self.shape[-1])], dim=-1)


Bases = Mapping[str, Basis]
"""Eigenbases that a caller turns rows into, by parameter name: thin ones take less memory."""

Columns = Callable[[Tensor, slice], "Tensor | UnitColumns"]
"""From outputs [m, C] of the given rows of a batch to the columns [m, C, R] to pull back."""

_STREAMING = 2
"""A pass that streams its columns takes this part of the byte budget: on a ResNet-20 chunks of
twice the size save 4 % of its time and cost 60 % more memory."""


Blocks = Iterator[tuple[str, BlockRows]]
"""Walks the parameters that affect the outputs, with their rows, computed on demand: only one
parameter's patches are held."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """A chunk of a batch after one forward pass; its R columns are pulled back on demand.

    Attributes:
        rows: which samples of the batch.
        outputs: network outputs [m, C].
        calls: what was recorded.
        n_columns: R.
        step: how many columns fit the memory of a pass at a time; R unless m is 1.
        byte_budget: that memory, in bytes.
        pull_back: some of the columns [m, r, ...] in what every call wrote, float32 or better; with
            True they are the last, and the graph is let go. None where a call does not affect the
            outputs.
    """

    rows: slice
    outputs: Tensor
    calls: Sequence[OperationCall]
    n_columns: int
    step: int
    byte_budget: int
    pull_back: Callable[[slice, bool], list[Cotangents]]

    def pull(self, part: slice, last: bool) -> Blocks:
        """Rows of some of the columns."""
        return blocks_of(self.calls, self.pull_back(part, last))

    @property
    def blocks(self) -> Blocks:
        """Rows of all columns; to be asked for once."""
        return self.pull(slice(0, self.n_columns), True)

    def tiles(self) -> Iterator[tuple[slice, Blocks]]:
        """All columns, as many at a time as fit; to be walked once."""
        for start in range(0, max(self.n_columns, 1), self.step):
            stop = min(start + self.step, self.n_columns)
            yield slice(start, stop), self.pull(slice(start, stop), stop == self.n_columns)

    def columns(self) -> Iterator[list[Cotangents]]:
        """One column after the other [m, 1, ...], for sums: no array of all of them is needed."""
        for r in range(self.n_columns):
            yield self.pull_back(slice(r, r + 1), r + 1 == self.n_columns)


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
    parameter's patches and Jacobian; the chunk length follows from ``byte_budget``. No result
    depends on it.

    Args:
        model: the network; left untouched.
        names: its covered parameters.
        byte_budget: working memory of one chunk, in bytes.
        general: those of the parameters whose operations have no rule.
    """

    model: nn.Module
    names: tuple[str, ...]
    byte_budget: int = DEFAULT_BYTE_BUDGET
    general: frozenset[str] = frozenset()
    _footprints: dict[tuple, Footprint] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters."""
        return next(self.model.parameters()).device

    def outputs(self, inputs: Any) -> Tensor:
        """Network outputs [m, C] without a graph."""
        parts = [
            full_precision(record(self.model, (), part).outputs.detach())
            for part in pieces(to_device(inputs, self.device))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def output_shape(self, inputs: Any) -> torch.Size:
        """Shape of one sample's outputs: [C], or [T, C]; a forward pass the first time."""
        return self._footprint(to_device(inputs, self.device)).outputs

    def columns_that_fit(self, inputs: Any, bases: Bases | None = None) -> int:
        """How many columns of one sample fit the byte budget; at least one."""
        footprint = self._footprint(to_device(inputs, self.device))
        return footprint.columns_in(self.byte_budget, bases)

    def chunks(
        self,
        inputs: Any,
        columns: Columns,
        *,
        n_columns: int | None = None,
        bases: Bases | None = None,
        streaming: bool = False,
        differentiable: bool = False,
    ) -> Iterator[Chunk]:
        """Forward and pull back, chunk by chunk; each sample is in exactly one.

        Args:
            inputs: one batch of model inputs.
            columns: what to pull back.
            n_columns: R where the caller knows it; else the number of outputs is assumed.
            bases: what rows are turned into, where the caller knows it; else whole bases are
                assumed.
            streaming: whether columns are asked for one at a time, each chunk's before the next
                chunk: its memory is then that of the graph and of one column.
            differentiable: keep the graph, for gradients with respect to ``inputs``. All columns
                are then held by it.

        Raises:
            ValueError: if ``inputs`` hold no sample.
        """
        inputs = to_device(inputs, self.device)
        length = batch_length(inputs)
        if length == 0:
            raise ValueError("the model inputs hold no sample.")
        step, at_a_time = length, 1 if streaming else n_columns
        if length > 1:
            budget = self.byte_budget // (_STREAMING if streaming else 1)
            step = max(1, min(length, budget // self._footprint(inputs).bytes(at_a_time, bases)))
        waiting = [*row_slices(length, step)][::-1]
        while waiting:
            rows = waiting.pop()
            part = inputs if rows == slice(0, length) else select_rows(inputs, rows)
            # The fused attention kernels cannot be differentiated twice.
            with math_attention() if differentiable else nullcontext():
                tape, general = self._taped(part, rows)
            if tape.unclear:  # not with another number of samples
                last = slice(rows.stop - 1, rows.stop)
                waiting += [last, slice(rows.start, last.start)]
                continue
            chunk = _chunk(tape, general, rows, columns, self.byte_budget, differentiable)
            alone = rows.stop - rows.start == 1 and chunk.n_columns > 1
            if alone and not (differentiable or streaming):
                chunk = self._in_tiles(chunk, part, bases)
            yield chunk

    def _taped(self, inputs: Any, rows: slice) -> tuple[Tape, GeneralRows]:
        """A tape, and beside it the rows of parameters that no rule knows."""
        tape = record(self.model, self.names, inputs, self.general)
        check_outputs(tape.outputs, rows.stop - rows.start, positions=True)
        tape.check_inputs()
        general = [name for name in self.names if name in self.general]
        return tape, general_rows(self.model, tape, general, inputs)

    def _in_tiles(self, chunk: Chunk, inputs: Any, bases: Bases | None) -> Chunk:
        """A chunk of one sample whose columns are held as many at a time as fit.

        Where that is not all of them, the other half of the memory is for what is kept of them.
        """
        budget, footprint = memory_of_one(self.byte_budget, self.device), self._footprint(inputs)
        step = chunk.n_columns
        if footprint.bytes(step, bases) > budget:
            step = min(step, footprint.columns_in(budget // 2, bases))
        return replace(chunk, step=step, byte_budget=budget)

    def _footprint(self, inputs: Any) -> Footprint:
        """What one sample takes; measured once for inputs of a shape."""
        key = tensor_shapes(inputs)
        if key not in self._footprints:
            if batch_length(inputs) == 0:
                raise ValueError("the model inputs hold no sample.")
            tape = record(self.model, self.names, select_rows(inputs, slice(0, 1)), self.general)
            check_outputs(tape.outputs, 1, positions=True)
            self._footprints[key] = Footprint.of(tape)
        return self._footprints[key]


def _chunk(
    tape: Tape,
    general: GeneralRows,
    rows: slice,
    columns: Columns,
    byte_budget: int,
    differentiable: bool,
) -> Chunk:
    outputs = full_precision(tape.outputs if differentiable else tape.outputs.detach())

    def read(tensor: Tensor) -> Tensor:
        return full_precision(tensor if differentiable else tensor.detach())

    calls = [call.with_inputs(read) for call in (*tape.calls, *general[0])]
    with outside_inference_mode(), torch.set_grad_enabled(differentiable):
        to_pull = columns(outputs, rows).to(tape.outputs.dtype)

    def pull_back(part: slice, last: bool) -> list[Cotangents]:
        pulled = []
        with outside_inference_mode(), torch.set_grad_enabled(differentiable):
            for r in range(part.start, part.stop):
                column = to_pull.column(r) if isinstance(to_pull, UnitColumns) else to_pull[..., r]
                retain = r + 1 < part.stop or not last
                found = tape.pull_back(column, create_graph=differentiable, retain_graph=retain)
                pulled.append(found + general[1](column))
            return _stacked(pulled, len(calls))

    n_columns = to_pull.shape[-1]
    return Chunk(rows, outputs, calls, n_columns, max(n_columns, 1), byte_budget, pull_back)


def _stacked(columns: list[list[Cotangents]], n_calls: int) -> list[Cotangents]:
    """R columns of every call as one [m, R, ...] per tensor; the columns are used up."""
    stacks: list[Cotangents] = []
    for index in range(n_calls):
        parts = [column[index] for column in columns]
        for column in columns:
            column[index] = None
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            stacks.append(None)
        elif len(known) == 1:
            stacks.append(tuple(full_precision(tensor.unsqueeze(1)) for tensor in known[0]))
        else:
            groups = zip(*known, strict=True)
            stacks.append(tuple(full_precision(torch.stack(group, dim=1)) for group in groups))
    return stacks
