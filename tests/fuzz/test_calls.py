"""Random wrong calls; ``python -m tests.fuzz.calls --calls 5000`` makes more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.calls import failures


@pytest.mark.parametrize("seed", range(3))
def test_every_wrong_call_ends_in_a_result_or_an_error_that_names_an_argument(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a file name may be among the wrong arguments
    assert not failures(100, seed)
