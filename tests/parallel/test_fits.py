"""Several processes fit as one does: to 1e-10 in float64, and the same on every rank to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.cases import CASES, fits
from tests.parallel.crowd import run


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return fits(0, list(CASES))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_worlds_agree(world: int, alone: dict[str, Any]) -> None:
    found = run(world, fits, list(CASES))
    for name, (expected, _) in alone.items():
        assert len({theirs[name][1] for theirs in found}) == 1, f"ranks differ in {name!r}"
        for rank, theirs in enumerate(found):
            for what, value in expected.items():
                label = f"{what} of {name!r} on rank {rank} of {world}"
                torch.testing.assert_close(
                    theirs[name][0][what],
                    value,
                    rtol=1e-10,
                    atol=1e-10,
                    msg=lambda text, at=label: f"{at}: {text}",
                )
