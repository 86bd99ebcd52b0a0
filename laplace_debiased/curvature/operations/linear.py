r"""Linear maps that are shared over positions: ``linear``, ``addmm``, ``matmul`` and ``einsum``.

The output at position t of sample n is W a_{n,t} + b; all dimensions between the batch and the last
one are positions.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from laplace_debiased.curvature.operations.call import OperationCall, Reading, RuleDefaults
from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import Factor, input_factor
from laplace_debiased.curvature.rows.parameters import BiasRows, MatrixRows


class LinearRule(RuleDefaults):
    """``linear(x, W, b)`` on [m, ..., D_in]; base of what is such a map in other words."""

    def readings(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Reading, ...]:
        return (Reading({"weight": weight, "bias": bias}, (input,)),)

    def input_positions(self, call: OperationCall) -> Tensor:
        """What was read, as a [m, T, D_in]."""
        (inputs,) = call.inputs
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])

    def output_positions(self, call: OperationCall, columns: Tensor) -> Tensor:
        """Columns [m, R, ..., D_out] as g [m, R, T, D_out]."""
        return columns.reshape(*columns.shape[:2], -1, columns.shape[-1])

    def bias_positions(self, call: OperationCall, columns: Tensor) -> Tensor:
        """Columns as a bias is added to them."""
        return self.output_positions(call, columns)

    def rows(self, call: OperationCall, slot: str, columns: tuple[Tensor, ...]) -> BlockRows:
        """Rows from the two."""
        if slot == "bias":
            return BiasRows(self.bias_positions(call, columns[0]))
        g = self.output_positions(call, columns[0])
        return MatrixRows(partial(self._fitting_inputs, call, g.shape), g, self.transposed)

    def input_factor(
        self, call: OperationCall, slot: str, counts: Tensor | None = None
    ) -> Factor | None:
        """Of what the weight reads."""
        return None if slot == "bias" else input_factor(self.input_positions(call), counts)

    def _fitting_inputs(self, call: OperationCall, columns: torch.Size) -> Tensor:
        """Inputs [..., m, T, D_in], checked to fit columns of a shape [..., m, R, T, D_out].

        Raises:
            ValueError: if they do not.
        """
        a = self.input_positions(call)
        if (a.shape[-3], a.shape[-2]) != (columns[-4], columns[-2]):
            raise ValueError(
                f"{call.operation} read {a.shape[-2]} positions of {a.shape[-3]} samples and wrote "
                f"{columns[-2]} of {columns[-4]}; is the first dimension of its input the batch?"
            )
        return a


class AddmmRule(LinearRule):
    """``addmm(b, x, W)``, with the weight stored as [D_in, D_out]."""

    def readings(  # type: ignore[override]
        self, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> tuple[Reading, ...]:
        if not beta == alpha == 1:
            return ()
        return (Reading({"weight": mat2, "bias": input}, (mat1,)),)

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> Tensor | None:
        """The weight the other way round."""
        return argument.mT if slot == "weight" else None


class MatmulRule(LinearRule):
    """``x @ W`` of a matrix [D_in, D_out], and ``W @ x`` of a matrix [D_out, D_in]."""

    def readings(  # type: ignore[override]
        self, input: Tensor, other: Tensor
    ) -> tuple[Reading, ...]:
        """The matrix on the right, or on the left of at least a batch of matrices."""
        found = []
        if other.ndim == 2 and input.ndim >= 2:
            found.append(Reading({"right": other}, (input,)))
        if input.ndim == 2 and other.ndim >= 3:
            found.append(Reading({"left": input}, (other,)))
        return tuple(found)

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> Tensor:
        """As [D_out, D_in]."""
        return argument.mT if slot == "right" else argument

    def input_positions(self, call: OperationCall) -> Tensor:
        """Columns of what the matrix stands left of are positions."""
        (inputs,) = call.inputs
        inputs = inputs.mT if "left" in call.uses else inputs
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])

    def output_positions(self, call: OperationCall, columns: Tensor) -> Tensor:
        return super().output_positions(call, columns.mT if "left" in call.uses else columns)


class ReversedMatmulRule(MatmulRule):
    """``other.__rmatmul__(input)``."""

    def readings(  # type: ignore[override]
        self, input: Tensor, other: Tensor
    ) -> tuple[Reading, ...]:
        """Arguments the other way round."""
        return super().readings(other, input)


@dataclass(frozen=True)
class Contraction:
    """How the operands of an einsum lie.

    Attributes:
        weight: order of the weight's dimensions, outputs first.
        n_outputs: how many of them are outputs.
        inputs: order of the other operand's: batch, positions, inputs.
        n_inputs: how many of them are inputs.
        outputs: order of the result's: batch, positions, outputs.
    """

    weight: tuple[int, ...]
    n_outputs: int
    inputs: tuple[int, ...]
    n_inputs: int
    outputs: tuple[int, ...]


def contraction(read: str, weight: str, wrote: str) -> Contraction | None:
    """How an einsum of two operands is a linear map; None if it is none.

    Args:
        read: letters of the operand that is no parameter, the batch first.
        weight: letters of the parameter.
        wrote: letters of the result.
    """
    inputs = [letter for letter in weight if letter in read and letter not in wrote]
    outputs = [letter for letter in weight if letter in wrote and letter not in read]
    positions = [letter for letter in read if letter in wrote and letter not in weight]
    if len(inputs) + len(outputs) != len(weight) or len(inputs) + len(positions) != len(read):
        return None
    if not positions or read[0] != positions[0] or wrote[0] != read[0]:
        return None
    if len(set(weight)) < len(weight) or len(set(read)) < len(read) or not (inputs and outputs):
        return None
    return Contraction(
        tuple(weight.index(letter) for letter in outputs + inputs),
        len(outputs),
        tuple(read.index(letter) for letter in positions + inputs),
        len(inputs),
        tuple(wrote.index(letter) for letter in positions + outputs),
    )


def spelled_out(equation: str, dimensions: list[int]) -> tuple[list[str], str] | None:
    """Letters of every operand and of the result, an ellipsis as letters of its own."""
    sides = equation.replace(" ", "").split("->")
    operands = sides[0].split(",")
    if len(sides) != 2 or len(operands) != len(dimensions):
        return None
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    extra = [d - len(o.replace("...", "")) for o, d in zip(operands, dimensions, strict=True)]
    longest = max((n for o, n in zip(operands, extra, strict=True) if "..." in o), default=0)

    def letters(operand: str, n: int) -> str:
        return operand.replace("...", "".join(unused[longest - n : longest]))

    found = [letters(o, n) for o, n in zip(operands, extra, strict=True)]
    return found, letters(sides[1], longest)


class EinsumRule(LinearRule):
    """``einsum`` of two operands, where it is a linear map of the one that is no parameter."""

    def readings(self, equation: Any, *operands: Any) -> tuple[Reading, ...]:
        """Either operand may be the parameter."""
        if len(operands) == 1 and isinstance(operands[0], tuple | list):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or len(operands) != 2:
            return ()
        spelled = spelled_out(equation, [operand.ndim for operand in operands])
        if spelled is None:
            return ()
        letters, wrote = spelled
        found = []
        for weight, read in ((1, 0), (0, 1)):
            spec = contraction(letters[read], letters[weight], wrote)
            if spec is not None:
                found.append(Reading({"weight": operands[weight]}, (operands[read],), spec))
        return tuple(found)

    def matrix(self, slot: str, argument: Tensor, settings: Any) -> Tensor:
        """As [D_out, D_in], each of them all dimensions of its kind."""
        turned = argument.permute(settings.weight)
        return turned.flatten(settings.n_outputs).flatten(0, settings.n_outputs - 1)

    def input_positions(self, call: OperationCall) -> Tensor:
        """In the order batch, positions, inputs."""
        spec: Contraction = call.settings
        (inputs,) = call.inputs
        found = call.flat(inputs).permute(spec.inputs)
        found = found.flatten(len(spec.inputs) - spec.n_inputs)
        return found.reshape(len(inputs), -1, found.shape[-1])

    def output_positions(self, call: OperationCall, columns: Tensor) -> Tensor:
        """In the order batch, positions, outputs."""
        spec: Contraction = call.settings
        m, n_columns = columns.shape[:2]
        found = call.flat(columns.flatten(0, 1)).permute(spec.outputs)
        found = found.flatten(len(spec.outputs) - spec.n_outputs)
        return found.reshape(m, n_columns, -1, found.shape[-1])


RULES: dict[Any, LinearRule] = {
    functional.linear: LinearRule(),
    **dict.fromkeys((torch.addmm, Tensor.addmm), AddmmRule()),
    **dict.fromkeys(
        (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), MatmulRule()
    ),
    Tensor.__rmatmul__: ReversedMatmulRule(),
    torch.einsum: EinsumRule(),
}
