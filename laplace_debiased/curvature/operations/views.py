r"""Where an argument of an operation lies in the parameter that it is a view of.

A parameter is read as a matrix S [D_0, D_1] in row-major order. An argument that is a linear map
[D_out, D_in] may be S, its transpose, or some rows and columns of either, as the chunks of a packed
projection are. The gradient in the parameter is then the argument's, with zeros around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import pad

from laplace_debiased.curvature.rows.base import BlockRows
from laplace_debiased.curvature.rows.gram import Factor, RowsFactor
from laplace_debiased.curvature.rows.parameters import MatrixRows, VectorRows, formed


@dataclass(frozen=True)
class Place:
    """Where an argument lies in its parameter.

    Attributes:
        shape: of the parameter as the matrix (D_0, D_1); (P,) as a vector.
        start: first row and column, or first entry, of the argument in it.
        stop: last ones, exclusive.
        transposed: whether the argument is the transpose of what lies there.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """Whether the argument is all of the parameter."""
        return self.stop == self.shape and not any(self.start)

    def _around(self, dimension: int) -> tuple[int, int]:
        return self.start[dimension], self.shape[dimension] - self.stop[dimension]

    def embedded(self, rows: BlockRows) -> BlockRows:
        """Rows of the argument as rows of the parameter.

        Raises:
            TypeError: for parts of a parameter in rows that have no parts.
        """
        if isinstance(rows, MatrixRows):
            transposed = rows.transposed != self.transposed
            if self.whole:
                return replace(rows, transposed=transposed)
            outs, ins = (1, 0) if transposed else (0, 1)
            inputs, around = rows.inputs, self._around(ins)
            columns = pad(rows.columns, self._around(outs))
            return MatrixRows(lambda: pad(formed(inputs), around), columns, transposed)
        if self.whole:
            return rows
        if isinstance(rows, VectorRows):
            return replace(rows, columns=pad(rows.columns, self._around(0)))
        raise TypeError("a part of this parameter cannot be told from the rest.")

    def embedded_factor(self, factor: Factor) -> Factor:
        """Factor of an argument's inputs as one of the parameter's side."""
        if self.whole:
            return factor
        around = self._around(0 if self.transposed else 1)
        if isinstance(factor, RowsFactor):
            return RowsFactor(pad(factor.rows, around))
        return pad(factor, (*around, *around)) if factor.ndim == 2 else pad(factor, around)


def vector_place(parameter: Tensor, argument: Tensor) -> Place | None:
    """Where consecutive entries of a parameter are; None if an argument is something else."""
    size = parameter.numel()
    if _same(parameter, argument):
        return Place((size,), (0,), (size,))
    if not (parameter.is_contiguous() and argument.is_contiguous()):
        return None
    start = int(argument.storage_offset()) - int(parameter.storage_offset())
    stop = start + argument.numel()
    return Place((size,), (start,), (stop,)) if start >= 0 and stop <= size else None


def matrix_place(parameter: Tensor, argument: Tensor, matrix: Tensor) -> Place | None:
    """Where an argument, a ``matrix`` [D_out, D_in], lies in its parameter; None if it does not."""
    if parameter.ndim < 2:
        return None
    if not parameter.is_contiguous():  # in another memory format; only as a whole
        shape = (len(parameter), parameter.numel() // len(parameter))
        transposed = argument.ndim == 2 and matrix.stride() != argument.stride()
        is_whole = _same(parameter, argument) and sorted(matrix.shape) == sorted(shape)
        return Place(shape, (0, 0), shape, transposed) if is_whole else None
    if matrix.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
        return None  # flattening it made a copy
    offset = int(matrix.storage_offset()) - int(parameter.storage_offset())
    for transposed in (False, True):
        place = _part(parameter, matrix.mT if transposed else matrix, offset, transposed)
        if place is not None:
            return place
    return None


def _part(parameter: Tensor, part: Tensor, offset: int, transposed: bool) -> Place | None:
    rows, columns = part.shape
    if columns > 1 and part.stride(1) != 1:
        return None
    widths = {math.prod(parameter.shape[axis:]) for axis in range(1, parameter.ndim)}
    width = part.stride(0) if rows > 1 else parameter.numel() // len(parameter)
    if width not in widths or width < columns:
        return None
    height = parameter.numel() // width
    top, left = divmod(offset, width)
    if offset < 0 or left + columns > width or top + rows > height:
        return None
    return Place((height, width), (top, left), (top + rows, left + columns), transposed)


def _same(parameter: Tensor, argument: Tensor) -> bool:
    return (
        argument.shape == parameter.shape
        and argument.stride() == parameter.stride()
        and int(argument.storage_offset()) == int(parameter.storage_offset())
    )
