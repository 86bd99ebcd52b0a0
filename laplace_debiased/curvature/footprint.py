"""What one sample takes in a pass, for chunks that fit a byte budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laplace_debiased.curvature.reading import parameter_rows, uses_of
from laplace_debiased.curvature.tape import Cotangents, Tape
from laplace_debiased.network.precision import full_precision


@dataclass(frozen=True)
class Footprint:
    """Working memory of one sample in a pass, from a tape of one sample.

    The graph holds about two tensors per recorded output (before and after its non-linearity);
    the columns one per output and column; one parameter at a time holds its patches twice and two
    arrays of the size of its rotated gradients.

    Attributes:
        outputs: shape of the network's outputs, [C] or [T, C].
        element: bytes of a number.
        inputs: entries of all recorded inputs.
        written: entries of all recorded outputs.
        parameters: per parameter, entries of its patches and of one column's rows.
    """

    outputs: torch.Size
    element: int
    inputs: int
    written: int
    parameters: tuple[tuple[int, int], ...]

    @staticmethod
    def of(tape: Tape) -> Footprint:
        """From a tape of one sample."""
        read = written = 0
        calls = [call.with_inputs(lambda a: full_precision(a.detach())) for call in tape.calls]
        zeros: list[Cotangents] = []
        zero = tape.outputs.detach().new_zeros(())
        for call, shapes in zip(calls, tape.shapes, strict=True):
            if call.uses:
                read += sum(tensor.numel() for tensor in call.inputs)
                written += sum(shape.numel() for shape in shapes)
            zeros.append(tuple(zero.expand(shape).unsqueeze(1) for shape in shapes))
        sizes = []
        for places in uses_of(calls).values():
            rows = parameter_rows(calls, places, zeros)
            if rows is not None:
                sizes.append((rows.patches, rows.entries + rows.columns[:, 0].numel()))
        return Footprint(
            tape.outputs.shape[1:], tape.outputs.element_size(), read, written, tuple(sizes)
        )

    def bytes(self, n_columns: int | None) -> int:
        """Of so many columns; None for one per output."""
        columns = self.outputs.numel() if n_columns is None else n_columns
        graph = self.inputs + (2 + columns) * self.written
        largest = max(
            (2 * patches + 2 * columns * rows for patches, rows in self.parameters), default=0
        )
        return max(1, self.element * (graph + largest))

    def columns_in(self, byte_budget: int) -> int:
        """How many columns fit; at least one."""
        fixed = self.bytes(0)
        rows = max((rows for _, rows in self.parameters), default=0)
        each = self.element * (self.written + 2 * rows)
        return max(1, (byte_budget - fixed) // max(1, each))
