"""Function draws of several processes are those of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parallel.cases import CASES, INPUTS
from tests.parallel.crowd import run

NAMES = ["cross fit", "few rows", "low rank", "last layer"]


def drawn(rank: int) -> dict[str, Tensor]:
    """Six functions [6, 5, 3] of every posterior, with the same random numbers on every rank."""
    return {
        name: CASES[name]
        .fitted()
        .functional_samples(INPUTS[:5], n_samples=6, generator=torch.Generator().manual_seed(3))
        for name in NAMES
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return drawn(0)


@pytest.mark.parametrize("world", [1, 2])
def test_worlds_draw_the_same_functions(world: int, alone: dict[str, Tensor]) -> None:
    found = run(world, drawn)
    for name, expected in alone.items():
        assert expected.shape == (6, 5, 3)
        assert float(expected.std(0).min()) > 0
        for theirs in found:
            torch.testing.assert_close(theirs[name], expected, rtol=1e-10, atol=1e-10)
