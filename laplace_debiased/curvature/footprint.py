"""What one sample takes in a pass, for chunks that fit a byte budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from laplace_debiased.curvature.operations.call import Cotangents, parameter_rows, uses_of
from laplace_debiased.curvature.rows.size import Basis, RowsSize
from laplace_debiased.curvature.tape import Tape
from laplace_debiased.network.precision import full_precision


@dataclass(frozen=True)
class Footprint:
    """Working memory of one sample in a pass, from a tape of one sample.

    The graph holds about two tensors per recorded output (before and after its non-linearity);
    the columns one per output and column, and one call's at a time a second time; one parameter at
    a time what :meth:`RowsSize.working` says.

    Attributes:
        outputs: shape of the network's outputs, [C] or [T, C].
        element: bytes of a number.
        inputs: entries of all recorded inputs.
        written: entries of all recorded outputs.
        largest: entries of the largest call's outputs.
        parameters: by name, what its rows are made of.
    """

    outputs: torch.Size
    element: int
    inputs: int
    written: int
    largest: int
    parameters: Mapping[str, RowsSize]

    @staticmethod
    def of(tape: Tape) -> Footprint:
        """From a tape of one sample."""
        read, written = 0, [0]
        calls = [call.with_inputs(lambda a: full_precision(a.detach())) for call in tape.calls]
        zeros: list[Cotangents] = []
        zero = tape.outputs.detach().new_zeros(())
        for call, shapes in zip(calls, tape.shapes, strict=True):
            if call.uses:
                read += sum(tensor.numel() for tensor in call.inputs)
                written.append(sum(shape.numel() for shape in shapes))
            zeros.append(tuple(zero.expand(shape).unsqueeze(1) for shape in shapes))
        sizes = {}
        for name, places in uses_of(calls).items():
            rows = parameter_rows(calls, places, zeros)
            if rows is not None:
                sizes[name] = rows.extent
        element = tape.outputs.element_size()
        shape = tape.outputs.shape[1:]
        return Footprint(shape, element, read, sum(written), max(written), sizes)

    def bytes(self, n_columns: int | None, bases: Mapping[str, Basis] | None = None) -> int:
        """Of so many columns (None: one per output), and rows that are turned into bases."""
        columns = self.outputs.numel() if n_columns is None else n_columns
        fixed, each = self._shares(bases)
        return max(1, self.element * (fixed + columns * each))

    def columns_in(self, byte_budget: int, bases: Mapping[str, Basis] | None = None) -> int:
        """How many columns fit; at least one."""
        fixed, each = self._shares(bases)
        return max(1, (byte_budget // self.element - fixed) // max(1, each))

    def _shares(self, bases: Mapping[str, Basis] | None) -> tuple[int, int]:
        """Entries that all columns share, and that each takes."""
        known = bases or {}
        working = [rows.working(known.get(name)) for name, rows in self.parameters.items()]
        fixed = max((shared for shared, _ in working), default=0)
        each = max((each for _, each in working), default=0)
        return self.inputs + 2 * self.written + fixed, self.written + max(self.largest, each)
