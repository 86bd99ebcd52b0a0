"""What rows hold: of several calls of one parameter nothing of the single ones."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from laplace_debiased.curvature import LinearRule, OperationCall
from laplace_debiased.curvature.operations.call import Use
from laplace_debiased.curvature.operations.views import Place
from laplace_debiased.curvature.rows.parameters import MatrixRows, joined_rows
from tests.tolerances import assert_exact

SAMPLES, COLUMNS, POSITIONS, OUT, IN = 3, 2, 4, 5, 6
WHOLE = Place((OUT, IN), (0, 0), (OUT, IN))
PART = Place((OUT + 1, IN + 2), (1, 1), (OUT + 1, IN + 1))


class Watched(LinearRule):
    """Makes its inputs as a convolution makes patches, and knows which are still there."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []

    def input_positions(self, call: OperationCall) -> Tensor:
        found = super().input_positions(call).clone()
        self.made.append(weakref.ref(found))
        return found


@pytest.mark.parametrize("place", [WHOLE, PART], ids=["whole", "part"])
def test_rows_of_several_calls_hold_no_inputs_or_columns_of_single_ones(place: Place) -> None:
    generator = torch.Generator().manual_seed(0)
    rule = Watched()
    parts = []
    for _ in range(2):
        inputs = torch.randn(SAMPLES, POSITIONS, IN, generator=generator, dtype=torch.float64)
        size = (SAMPLES, COLUMNS, POSITIONS, OUT)
        columns = torch.randn(size, generator=generator, dtype=torch.float64)
        call = OperationCall("linear", rule, {"weight": Use("w", place)}, (inputs,))
        parts.append(call.rows("weight", (columns,)))
    expected = sum(part.gradients() for part in parts)
    pulled = [weakref.ref(part.columns) for part in parts]
    rows = joined_rows(parts)
    del parts, columns

    assert isinstance(rows, MatrixRows)
    assert_exact(rows.gradients(), expected)  # forms the inputs
    assert rule.made
    assert not any(ref() is not None for ref in (*rule.made, *pulled))
